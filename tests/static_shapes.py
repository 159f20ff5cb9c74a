"""What a step must not do if a GPU is to record it: wait for a number, or take one from the host."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "isin"}
COPIES = {"lift_fresh", "lift_fresh_copy", "scalar_tensor"}  # torch.tensor(…), torch.where(…, …, 0)


class nothing_waits(TorchDispatchMode):
    """Within it such operations fail."""

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        name = operation.__name__.split(".")[0]
        assert name not in WAITS | COPIES, f"{name} in a step that is to be recorded"
        return operation(*given, **(named or {}))
