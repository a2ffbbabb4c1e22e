"""Usage statistics of a codebook, and replacement of unused codes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

RECENT_STEPS = 10
"""Number of latest steps within which a code counts as used."""


class CodebookUse(nn.Module):
    """Counter of the steps since each code was last used.

    Args:
        num_embeddings: Number of codes.
    """

    age: Tensor

    def __init__(self, num_embeddings: int) -> None:
        super().__init__()
        self.register_buffer("age", torch.full((num_embeddings,), RECENT_STEPS))

    def counts(self, indices: Int[Tensor, "batch h w"]) -> Int[Tensor, " codes"]:
        """Return how often each code was used."""
        taken = indices.flatten()  # bincount would make the host wait for the largest index
        return torch.zeros_like(self.age).index_add_(0, taken, torch.ones_like(taken))

    def update(self, counts: Int[Tensor, " codes"]) -> None:
        """Finish a step in which the codes were used ``counts`` times."""
        self.age.copy_(torch.where(counts > 0, 0, self.age + 1))

    @property
    def share(self) -> Tensor:
        """Share of codes that were used within the last ``RECENT_STEPS`` steps."""
        return (self.age < RECENT_STEPS).float().mean()

    def dead(self, steps: int) -> Int[Tensor, " dead"]:
        """Return the codes that have not been used for ``steps`` steps."""
        return (self.age >= steps).nonzero().flatten()

    def revive(self, codes: Int[Tensor, " dead"], codebook: nn.Embedding, rows: Float[Tensor, "dead c"]) -> None:
        """Replace codes with ``rows`` of latents."""
        with torch.no_grad():
            codebook.weight[codes] = rows.to(codebook.weight)
        self.age[codes] = 0


def drawn_rows(latents: Float[Tensor, "batch c h w"], count: int, seed: int) -> Float[Tensor, "count c"]:
    """Draw pixels of latents, depending only on the seed, with a little noise so that no two are equal."""
    generator = torch.Generator().manual_seed(seed)
    rows = latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2).cpu()
    drawn = rows[torch.randint(len(rows), (count,), generator=generator)]
    return drawn + 0.01 * rows.std() * torch.randn(drawn.shape, generator=generator)


def snap(latents: Float[Tensor, "batch c h w"], quantized: Tensor, dropped: Tensor) -> Float[Tensor, "batch c h w"]:
    """Return the codes, except for samples marked in ``dropped`` (batch,), which keep their latents."""
    return torch.where(dropped[:, None, None, None], latents, quantized)
