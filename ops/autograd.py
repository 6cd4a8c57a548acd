"""The derivative of an operator of attention, the same for each implementation."""
import torch


def allocate_gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Memory for the gradient of each."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def register_gradients(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef, num_tensors: int):
    """Let autograd differentiate one operator by another.

    Args:
        forward: (query, key, value, ..., settings...) -> (out, lse), of which `lse` is for the derivative alone.
        backward: (query, key, value, ..., out, grad_out, lse, settings...) -> the gradients of query, key and value.
        num_tensors: How many inputs are tensors or None, those first three among them; the others are settings.
    """

    def save(ctx, inputs, output):
        tensors, ctx.settings = inputs[:num_tensors], inputs[num_tensors:]
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)

    def gradients(ctx, grad_out, _grad_lse):
        others = (None,) * (num_tensors - 3 + len(ctx.settings))
        if grad_out is None:
            return None, None, None, *others
        *tensors, out, lse = ctx.saved_tensors
        return *backward(*tensors, out, grad_out, lse, *ctx.settings), *others

    forward.register_autograd(gradients, setup_context=save)
