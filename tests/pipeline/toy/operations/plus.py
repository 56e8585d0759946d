def plus(value: int, operand: int) -> int:
    return value + operand
