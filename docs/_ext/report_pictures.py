"""Pictures of reports."""


def added(text: str) -> str:
    return text
