raise ImportError("it is not here")
