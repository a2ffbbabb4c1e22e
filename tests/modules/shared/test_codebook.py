"""Use of a codebook is counted in steps, and dead codes are moved to latents."""

import torch
from torch import nn

from rewurst.modules.shared.codebook import RECENT_STEPS, CodebookUse, drawn_rows, snap


def test_ages_are_steps_since_a_code_was_used() -> None:
    use = CodebookUse(4)
    assert use.share == 0
    for indices in ([0, 1], [1], [1, 1]):
        use.update(use.counts(torch.tensor(indices).view(1, 1, -1)))
    assert use.age.tolist() == [2, 0, RECENT_STEPS + 3, RECENT_STEPS + 3]
    assert use.share == 0.5
    assert use.dead(2).tolist() == [0, 2, 3]


def test_revived_codes_are_latents() -> None:
    use, codebook = CodebookUse(4), nn.Embedding(4, 3)
    kept = codebook.weight.detach()[:2].clone()
    latents = torch.randn(2, 3, 5, 5)
    rows = drawn_rows(latents, 2, seed=3)
    assert torch.equal(rows, drawn_rows(latents, 2, seed=3))
    distances = torch.cdist(rows, latents.permute(0, 2, 3, 1).reshape(-1, 3))
    assert distances.min(dim=1).values.max() < 0.1
    use.revive(torch.tensor([2, 3]), codebook, rows)
    assert torch.equal(codebook.weight[2:], rows)
    assert torch.equal(codebook.weight[:2], kept)
    assert use.age[2:].tolist() == [0, 0]


def test_dropped_samples_keep_their_latents() -> None:
    latents, codes = torch.zeros(3, 2, 1, 1), torch.ones(3, 2, 1, 1)
    assert snap(latents, codes, torch.tensor([True, False, True]))[:, 0, 0, 0].tolist() == [0, 1, 0]
