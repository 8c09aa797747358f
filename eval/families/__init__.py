"""Every causal language model of the installed transformers, tiny and random: is it served, and exactly?"""
