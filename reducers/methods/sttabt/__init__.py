"""STTABT (Lee et al., ICLR 2023): the method, the network that guesses attention, and masks that can be learned."""

from reducers.methods.sttabt.method import STTABT

__all__ = ["STTABT"]
