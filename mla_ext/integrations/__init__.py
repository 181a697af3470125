"""What other programs need beyond an optimizer: one module each, imported only by those who use that program."""

__all__: list[str] = []
