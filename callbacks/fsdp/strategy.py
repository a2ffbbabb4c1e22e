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
"""Methods that compute with the module's parameters and are called from outside ``forward``."""


class FSDP(ModelParallelStrategy):
    """Strategy that shards parameters, gradients and optimizer states of any LightningModule over processes (FSDP2).

    Each block is gathered for its computation and freed after it. Everything outside of blocks (embeddings, heads, the
    module's own parameters) forms one more group, gathered once per step. The module does not need
    ``configure_model``: build it as usual, or under :func:`~rewurst.callbacks.construct_on_rank_zero` if it is too
    large for every process of a node to have a whole copy. It must use automatic optimization. Frozen direct children
    are not sharded.

    Norm clipping works, through the Trainer or ``nn.utils.clip_grad_norm_``. Checkpoints are folders
    (:mod:`rewurst.checkpoints.sharded_writing`) that load with any number of processes; ``fit`` also resumes from an
    unsharded file.

    Args:
        blocks: Class names of the blocks (default: those that :func:`.blocks.find_blocks` finds).
        replicas: Number of groups of processes for hybrid sharding, each with a whole copy that it shards, or
            ``"nodes"`` for a group per node. With gradient accumulation, groups communicate once per step.
        param_dtype: Data type in which parameters are gathered and used (default: bfloat16 under ``precision:
            bf16-mixed``, otherwise their own). Shards and optimizer states keep their own.
        reduce_dtype: Data type in which gradients are summed.
        activation_checkpointing: Number n, to recompute every n-th block in the backward pass (default: none).
        compile: Whether to compile each block.
        cpu_offload: Whether to keep shards, and step the optimizer, in host memory.
        reshard_after_forward: Whether to free a block's parameters after its forward and gather them again for
            backward, or the number of processes to keep them sharded over instead.
        forward_methods: Additional methods of the module that compute with its parameters and are called from outside.
        process_group_backend: Backend of the process group, as in Lightning.
        timeout: Timeout of the process group, as in Lightning.

    Raises:
        UsageError: Blocks match nothing, replicas do not divide the processes, optimization is manual, the optimizer
            cannot step on shards, or a checkpoint is incomplete or of a different model.

    Example::

        Trainer(strategy=FSDP(), devices=8, precision="bf16-mixed").fit(module, data)
        Trainer(strategy="rewurst.callbacks.FSDP", devices=8).fit(module, data)  # as in YAML
    """

    computes_together = True
    """All processes must call the module equally often, because none can compute alone."""

    def __init__(
        self,
        blocks: Sequence[str] | None = None,
        replicas: int | Literal["nodes"] = 1,
        param_dtype: DType | None = None,
        reduce_dtype: DType = "float32",
        activation_checkpointing: int | None = None,
        compile: bool = False,  # noqa: A002  # the established term
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
        """Whether Lightning restores optimizers after callbacks, which may remove states from the checkpoint."""
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments with which every process reads different rows."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Connect the processes and arrange them as replicas times shards."""
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
        """Shard the module and build its optimizers."""
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
        """Shard, and broadcast the first process's values if a process has none or replicas could differ."""
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
        """Return a mesh of two dimensions for hybrid sharding, or of one for a single replica."""
        return self.device_mesh if self.device_mesh["replicate"].size() > 1 else self.device_mesh["shard"]

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Let replicas sum accumulated gradients only once, at the last micro-batch."""
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
        """Run the module's step, with buffers that all processes share."""
        self._share_buffers()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, with buffers that all processes share."""
        self._share_buffers()
        return super().test_step(*args, **kwargs)

    def on_validation_start(self) -> None:
        """Schedule sharing buffers in the first step, after callbacks have swapped in those to evaluate."""
        self._buffers_shared = False

    def on_test_start(self) -> None:
        """Do the same as before validation."""
        self._buffers_shared = False

    def _share_buffers(self) -> None:
        """Share buffers: in training each process has its own BatchNorm statistics; the first's are evaluated."""
        assert self.lightning_module is not None
        if not self._buffers_shared:
            share_buffers(self.lightning_module)
            self._buffers_shared = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's tensors; sharded tensors stay sharded."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state by parameter names."""
        assert self.lightning_module is not None
        return named_state(getattr(optimizer, "_optimizer", optimizer), self.lightning_module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder atomically."""
        path = str(self.broadcast(str(filepath)))
        if storage_options is not None or "://" in path:
            raise UsageError(f"FSDP: sharded checkpoints are only written to a file system, not to {path}")
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read this process's part of a checkpoint; no code is executed, regardless of ``weights_only``."""
        module = self.lightning_module
        assert module is not None
        training = module.trainer.state.fn == TrainerFn.FITTING  # optimizers persist after it; test needs only weights
        path = Path(self.broadcast(str(checkpoint_path)))
        return load_checkpoint(path, module, self.optimizers if training else [])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing, because the module's tensors were read in place."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states that callbacks have left in the checkpoint into the optimizers."""
        assert self.lightning_module is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            restore_named_state(optimizer, state, self.lightning_module)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint atomically."""
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))


# The Trainer looks up names in lower case, and "fsdp" is Lightning's own strategy.
StrategyRegistry.register("rewurst.callbacks.fsdp", FSDP, description="FSDP2 for any LightningModule", override=True)
