"""Run by test_aem under torchrun: 12 rows in groups of 4. Each of two ranks has six rows, so one group spans both ranks."""

import torch
import torch.distributed as dist

from aem_exp import aem


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    mask_NT = (torch.rand(12, 9, generator=generator) < 0.7).long()
    entropy_NT = torch.rand(12, 9, generator=generator) * 2
    group_N = torch.arange(12) // 4

    def per_response(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        response_NT = aem.responses(mask_NT[rows])
        starts = (response_NT >= 0) & (response_NT != torch.nn.functional.pad(response_NT, (1, 0), value=-1)[:, :-1])
        return aem.response_entropy(entropy_NT[rows], response_NT), group_N[rows][starts.nonzero()[:, 0]]

    alone = aem.coefficients(*per_response(slice(None)))
    share = 12 // ranks
    gathered: list = [None] * ranks
    dist.all_gather_object(gathered, per_response(slice(rank * share, (rank + 1) * share)))
    together = aem.coefficients(*(torch.cat(parts) for parts in zip(*gathered, strict=True)))
    assert torch.equal(together, alone)
    for group in range(3):
        assert abs(together[per_response(slice(None))[1] == group].mean() - 1) < 1e-6
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
