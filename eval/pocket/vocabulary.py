"""The 512 words a pocket model knows, by what they are in a sentence.

One word is one token, so a document's length in tokens is its number of words, and every position can be named
before anything is tokenized.
"""

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<bos>", "<eos>"
SPECIAL = (PAD, UNKNOWN, BEGIN, END)
SIZE = 512

PUNCTUATION = tuple(". , : ; ? !".split())
DIGITS = tuple("0 1 2 3 4 5 6 7 8 9".split())

# Words of the fact and question templates, and of those a second kind of task would need (two hops, lists, copies).
TEMPLATE = tuple(
    """what which who where is are of code copy repeat find every also with both list all they do call
    value answer question text note again said no""".split()
)

KEY_ADJECTIVES = tuple(
    """amber azure bronze copper coral crimson cyan ebony emerald golden indigo ivory jade lilac magenta maroon ochre
    olive opal orange pearl pink purple ruby russet saffron scarlet silver teal turquoise velvet violet white yellow
    arctic desert forest island lunar marble misty northern ocean polar royal solar stormy winter""".split()
)
KEY_NOUNS = tuple(
    """badger bear beaver bison buffalo camel cheetah cobra condor cougar coyote crane crow deer dingo dolphin donkey
    dragon eagle egret elephant falcon ferret finch fox gazelle gecko giraffe goose gorilla hamster hare hawk hedgehog
    heron hornet hyena ibex iguana jackal jaguar kestrel koala lemur leopard lion lizard llama lobster lynx magpie
    mammoth marten mole monkey moose moth newt ocelot octopus orca osprey ostrich otter owl panda panther parrot
    pelican penguin pigeon puma rabbit raccoon raven rhino salmon seal shark sparrow""".split()
)
VALUES = tuple(
    """alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo
    sierra tango uniform victor whiskey xray yankee zulu two three four five six seven eight nine ten eleven twelve
    thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    hundred thousand million iron zinc nickel cobalt carbon helium neon argon oxygen sulphur sodium radium uranium
    mercury venus mars jupiter saturn neptune pluto apple banana cherry lemon mango melon olives papaya peach plum
    raisin walnut almond ginger pepper nutmeg""".split()
)

DETERMINERS = tuple("the this that one another".split())
ADJECTIVES = tuple(
    """old young tall small quiet busy clever tired happy gentle careful patient nervous cheerful lonely famous
    friendly hungry sleepy curious honest lazy polite proud brave grumpy modest loyal serious stubborn""".split()
)
SUBJECTS = tuple(
    """baker farmer miller sailor teacher doctor painter singer writer driver gardener hunter tailor carpenter
    shepherd captain soldier clerk lawyer judge nurse student porter potter weaver fisher waiter builder dancer actor
    banker barber blacksmith butcher cook guard neighbour stranger traveller visitor""".split()
)
VERBS = tuple(
    """walked waited worked rested sang slept stood talked read ate danced stopped laughed played stayed wandered
    hurried sat cooked painted listened argued prayed whistled dreamed wept shouted travelled lingered paused smiled
    smoked coughed sneezed yawned shivered rambled dozed""".split()
)
ADVERBS = tuple(
    """alone slowly early late often quietly happily calmly twice daily together loudly softly briefly gladly
    sadly""".split()
)
PREPOSITIONS = tuple("near behind beside under past inside outside around above below".split())
POSSESSIVES = tuple("my your our his her their its".split())
OBJECTS = tuple(
    """house garden market harbour bridge river mill church school station tower castle cottage barn field meadow
    orchard village road fountain library kitchen workshop cellar stable well gate wall hedge pond shore lighthouse
    ferry inn tavern theatre museum bakery square hall chapel factory warehouse canal
    temple palace tunnel mine quarry vineyard pasture hill""".split()
)
CONJUNCTIONS = tuple("and while because until before after".split())

# Not used by the needle task; kept so that tasks with people in them need no new vocabulary.
NAMES = tuple(
    """adam alice anna ben carla clara daniel david diana edward elena emma eric felix fiona frank george grace hannah
    henry irene jack jane julia laura leo lucy maria martin nora oliver paul peter rosa sarah simon sophie thomas
    walter wendy zoe""".split()
)
