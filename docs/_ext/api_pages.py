"""The API page."""


def text() -> str:
    return ""
