"""Muon: momentum whose matrix updates are orthogonalised by Newton-Schulz steps, in float32 for the CPU."""

import torch


def orthogonalise(updates: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of `updates` (matrices, rows, columns) towards one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = updates.shape[-2] > updates.shape[-1]
    x = updates.mT if tall else updates
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates; all parameters must be matrices."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float = 0.02, momentum: float = 0.95):
        # One group per shape: equal matrices are orthogonalised in one batch, several times faster on small ones.
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        groups = [{"params": [matrix for matrix in matrices if tuple(matrix.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every matrix from its gradient."""
        for group in self.param_groups:
            gradients = torch.stack([matrix.grad for matrix in group["params"]])
            state = self.state[group["params"][0]]
            velocity = state.setdefault("velocity", torch.zeros_like(gradients))
            velocity.lerp_(gradients, 1 - group["momentum"])
            update = orthogonalise(gradients.lerp(velocity, group["momentum"]))
            rows, columns = gradients.shape[-2:]
            update *= -group["lr"] * max(1.0, rows / columns) ** 0.5
            for matrix, change in zip(group["params"], update, strict=True):
                matrix.add_(change)
