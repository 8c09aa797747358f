"""Stands in for OpenVINO's runtime."""


class Tensor:
    def __init__(self, data):
        self.data = data
