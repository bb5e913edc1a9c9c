"""A reward of the online part, which models of random weights can earn."""


def share_of_letters(row: dict, text: str) -> float:
    """Of the characters of ``text`` those that are letters, 0 to 1."""
    return sum(character.isalpha() for character in text) / max(len(text), 1)
