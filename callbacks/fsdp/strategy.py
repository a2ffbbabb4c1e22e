"""Fully sharded training of any LightningModule, in one line of YAML."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from ... import UsageError
from ...checkpoints.optimizer_names import named_state, refuse_optimizers, restore_named_state
from ...checkpoints.sharded_reading import load_checkpoint
from ...checkpoints.sharded_writing import remove_checkpoint, save_checkpoint
from ...lightning_compat import optimizers_to_device
from .blocks import DType, compile_blocks, find_blocks, frozen_children, mixed_precision, recompute
from .weights import any_rank_is_empty, hand_out, refuse_empty_frozen, share_buffers, whole_on_rank_zero

STEPS = ("training_step", "validation_step", "test_step", "predict_step", "draw_samples")
"""What is called from outside of ``forward`` and computes with the module's parameters."""


class FSDP(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer states of any LightningModule over processes (FSDP2).

    Each block is gathered when it computes and let go after it; what is outside of blocks (embeddings, heads, the
    module's own parameters) is one more group, gathered once a step. The module needs no ``configure_model``: it is
    built as ever, or under :func:`~rewurst.callbacks.construct_on_rank_zero` where it is too large for every process
    of a node to hold it whole. It has to be one with automatic optimization. Direct children that are frozen stay
    whole in every process.

    Norm clipping works, by the Trainer or by ``nn.utils.clip_grad_norm_``. Checkpoints are folders
    (:mod:`rewurst.checkpoints.sharded_writing`) that load at any number of processes; ``fit`` also resumes from an
    unsharded file.

    Args:
        blocks: Class names of the blocks; by default what :func:`.blocks.find_blocks` finds.
        replicas: Hybrid sharding: as many groups of processes hold a whole copy each and shard it among themselves,
            ``"nodes"`` for one on each node. Where gradients are accumulated, groups talk once a step.
        param_dtype: What parameters are gathered and computed in; by default bfloat16 under ``precision:
            bf16-mixed``, else their own. Shards and optimizer states keep their own.
        reduce_dtype: What gradients are summed in.
        activation_checkpointing: Recompute every n-th block in the backward pass, none by default.
        compile: Compile each block.
        cpu_offload: Keep shards, and step the optimizer, in the host's memory.
        reshard_after_forward: Let a block's parameters go after its forward and gather them again for backward; an
            integer keeps them sharded over that many processes instead.
        forward_methods: More methods of the module that compute with its parameters and are called from outside.
        process_group_backend: As Lightning's.
        timeout: As Lightning's.

    Raises:
        UsageError: Blocks that match nothing, replicas that do not divide the processes, manual optimization, an
            optimizer that cannot step on shards, a checkpoint of another model or without all of its files.

    Example::

        Trainer(strategy=FSDP(), devices=8, precision="bf16-mixed").fit(module, data)
        Trainer(strategy="rewurst.callbacks.FSDP", devices=8).fit(module, data)  # and so in YAML
    """

    computes_together = True
    """No process can compute with the module alone: all call it, as often."""

    def __init__(
        self,
        blocks: Sequence[str] | None = None,
        replicas: int | Literal["nodes"] = 1,
        param_dtype: DType | None = None,
        reduce_dtype: DType = "float32",
        activation_checkpointing: int | None = None,
        compile: bool = False,  # noqa: A002  # the field's word
        cpu_offload: bool = False,
        reshard_after_forward: bool | int = True,
        forward_methods: Sequence[str] = (),
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        if isinstance(blocks, str):
            blocks = [blocks]
        for name, value in (("replicas", replicas), ("activation_checkpointing", activation_checkpointing)):
            if isinstance(value, int) and value < 1:
                raise UsageError(f"FSDP: {name} {value} must be at least 1")
        self.blocks, self.replicas = blocks, replicas
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.activation_checkpointing, self.compile = activation_checkpointing, compile
        self.cpu_offload, self.reshard_after_forward = cpu_offload, reshard_after_forward
        self.forward_methods = forward_methods
        self._buffers_shared = False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored after callbacks have looked at the checkpoint, which may leave their states out."""
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has rows of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Connects the processes and lays them out as replicas times shards."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        replicas = self.num_nodes if self.replicas == "nodes" else self.replicas
        if self.world_size % replicas:
            raise UsageError(f"FSDP: replicas {replicas} do not divide {self.world_size} processes")
        shape = (replicas, self.world_size // replicas)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: Trainer) -> None:
        """Shards the module and makes its optimizers."""
        module = self.lightning_module
        assert self.accelerator is not None
        assert module is not None
        self.accelerator.setup(trainer)
        if not module.automatic_optimization:
            raise UsageError(
                f"FSDP: {type(module).__name__} steps its optimizers itself, between partial backward passes: use "
                "strategy ddp"
            )
        if not isinstance(module, FSDPModule):
            self.model = self._shard_and_fill(self.precision_plugin.convert_module(module))
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            refuse_optimizers(self.optimizers)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING and not self.cpu_offload:
            optimizers_to_device(self.optimizers, self.root_device)

    def _shard_and_fill(self, module: nn.Module) -> nn.Module:
        """Shards; where a process has no memory yet, or replicas could differ, the first one's values go to all."""
        refuse_empty_frozen(module)
        empty = any_rank_is_empty(module, self.root_device)
        handed_out = empty or self.device_mesh["replicate"].size() > 1
        whole = whole_on_rank_zero(module, self.root_device) if handed_out else None
        self._shard(module)
        if empty and self.global_rank:
            module.to_empty(device="cpu" if self.cpu_offload else self.root_device)
        if whole is not None:
            hand_out(module, whole, self.root_device)
        if not self.cpu_offload:
            module.to(self.root_device)  # buffers, and frozen children
        return module

    def _shard(self, module: nn.Module) -> None:
        blocks = find_blocks(module, self.blocks)
        if self.compile:
            compile_blocks(blocks)
        if self.activation_checkpointing is not None:
            recompute(blocks[::-1], self.activation_checkpointing)
        whole = {parameter for child in frozen_children(module) for parameter in child.parameters()}
        options: dict[str, Any] = {
            "mesh": self._sharding_mesh(),
            "mp_policy": mixed_precision(self.precision_plugin, self.param_dtype, self.reduce_dtype),
            "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
            if self.cpu_offload
            else OffloadPolicy(),
            "ignored_params": whole,
        }
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(module, **options)
        for name in (*STEPS, *self.forward_methods):
            if callable(getattr(module, name, None)):
                register_fsdp_forward_method(module, name)
        kinds = ", ".join(sorted({type(block).__name__.removeprefix("FSDP") for block in blocks}))
        rank_zero_info(f"FSDP: {len(blocks)} blocks ({kinds}), replicas x shards {tuple(self.device_mesh.shape)}")

    def _sharding_mesh(self) -> DeviceMesh:
        """Two dimensions for hybrid sharding, one where there is one replica."""
        return self.device_mesh if self.device_mesh["replicate"].size() > 1 else self.device_mesh["shard"]

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """While gradients accumulate, replicas sum theirs only once, at the last micro-batch."""
        module = self.lightning_module
        if not isinstance(module, FSDPModule) or self.device_mesh["replicate"].size() == 1:
            yield
            return
        module.set_requires_all_reduce(False)
        try:
            yield
        finally:
            module.set_requires_all_reduce(True)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with buffers that all processes share."""
        self._share_buffers()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with buffers that all processes share."""
        self._share_buffers()
        return super().test_step(*args, **kwargs)

    def on_validation_start(self) -> None:
        """Steps will share buffers: once, when callbacks have put those in place that are judged."""
        self._buffers_shared = False

    def on_test_start(self) -> None:
        """As before validation."""
        self._buffers_shared = False

    def _share_buffers(self) -> None:
        """Statistics of BatchNorm are each process's own while training; the first one's are saved and judged."""
        assert self.lightning_module is not None
        if not self._buffers_shared:
            share_buffers(self.lightning_module)
            self._buffers_shared = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's tensors, sharded ones as they are."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state by the names of parameters."""
        assert self.lightning_module is not None
        return named_state(getattr(optimizer, "_optimizer", optimizer), self.lightning_module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a folder that is there whole or not at all."""
        path = str(self.broadcast(str(filepath)))
        if storage_options is not None or "://" in path:
            raise UsageError(f"FSDP: sharded checkpoints are written to a file system, not to {path}")
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what this process holds of a checkpoint; nothing is executed, whatever ``weights_only`` says."""
        module = self.lightning_module
        assert module is not None
        training = module.trainer.state.fn == TrainerFn.FITTING  # optimizers stay after it, and test needs weights only
        path = Path(self.broadcast(str(checkpoint_path)))
        return load_checkpoint(path, module, self.optimizers if training else [])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: the module's tensors were read in place."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Hands the optimizers the states that callbacks have left in the checkpoint."""
        assert self.lightning_module is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            restore_named_state(optimizer, state, self.lightning_module)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Takes a checkpoint away, so that no part of it is ever found."""
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))


# The Trainer looks names up in lower case; "fsdp" is Lightning's own, of before.
StrategyRegistry.register("rewurst.callbacks.fsdp", FSDP, description="FSDP2 for any LightningModule", override=True)
