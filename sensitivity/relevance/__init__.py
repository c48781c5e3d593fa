"""Layer-wise relevance propagation: the output is traced back, operation by operation.

Relevance is input times a messenger gradient (Achtibat et al. 2024, AttnLRP): an operation that is
linear in its differentiable operands conserves it with its ordinary backward pass, others run with
a backward pass that carries their rule. What a constant absorbs is told, from its own formula.
"""
