def times(value: int, operand: int) -> int:
    return value * operand
