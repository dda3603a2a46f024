"""Run lengths of masks as text, as COCO stores them."""


def runs_of_text(text: str) -> list[int] | None:
    """Decode COCO's compressed run-length encoding.

    Each number is the difference from the one two before (from the fourth on), in groups of five
    bits, the lowest first; the sixth bit of a character says that more follow (pycocotools,
    ``maskApi.c``, ``rleFrString``).

    Returns:
        Lengths of background and foreground in turn, column by column, without a number that is cut
        short at the end; None if the text is not of this form.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # negative
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs
