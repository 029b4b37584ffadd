"""FSDP: what is trained, its gradients and the optimiser's state are divided among the processes."""

import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from functional.gradients import trained
from models.heads.daformer import DAFormerHead
from models.madm import Projection

# Each is gathered, used and freed as a whole. Larger ones would not do: the early stop at the last tap leaves
# the U-Net's blocks by an exception, and MADM calls parts of its adapter one by one.
UNITS = (ResnetBlock2D, Transformer2DModel, Projection, DAFormerHead)


class FSDP(DDPStrategy):
    """Divides the weights that change in training among all processes, by torch's fully_shard.

    Frozen weights stay whole in each process. A checkpoint holds whole tensors: it is that of any other run,
    which goes on from it with FSDP or without. Only fitting shards. A method can be sharded if its
    `sharded_calls` are not None.

    Args:
        timeout_minutes: after which a process that waits for another gives up.

    Raises:
        ValueError: the method cannot be sharded.
    """

    def __init__(self, timeout_minutes: float = 30):
        super().__init__(timeout=timedelta(minutes=timeout_minutes))

    def connect(self, model: nn.Module) -> None:
        """Take a LightningModule, unless it cannot be sharded."""
        if model.sharded_calls is None:
            raise ValueError(
                f"FSDP cannot train {type(model).__name__} as configured: found trainer.strategy "
                f"{type(self).__module__}.{type(self).__name__}, which trains the supervised baseline, and "
                "MADM without a U-Net of the teacher's own (ema_unet: false). Set trainer.strategy to ddp."
            )
        super().connect(model)

    def configure_ddp(self) -> None:
        """Shard the network in place; there is no wrapper around the LightningModule."""
        module = self.lightning_module
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)  # as DDP makes sure of
        frozen = set(module.frozen_parameters().values())
        shard(module.network, frozen, module.sharded_calls, self.root_device)

    def on_validation_start(self) -> None:
        """Gather all weights until the validation ends: not all processes need have equally many batches."""
        for part in self.sharded():
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def on_validation_end(self) -> None:
        """Divide the weights again."""
        for part in self.sharded():
            # The whole network's own are kept from the forward to the backward pass, as is torch's default.
            part.set_reshard_after_forward(part is not self.lightning_module.network, recurse=False)
            part.reshard()

    def sharded(self) -> list[FSDPModule]:
        """The parts whose weights are divided."""
        return [part for part in self.lightning_module.modules() if isinstance(part, FSDPModule)]

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The state of the module in whole tensors; all processes must call this."""
        return {name: whole(value) for name, value in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of an optimiser in whole tensors; all processes must call this."""
        state = super().optimizer_state(optimizer)
        values = {i: {k: whole(v) for k, v in found.items()} for i, found in state["state"].items()}
        return {**state, "state": values}

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Divide the whole tensors of a checkpoint as the parameters are divided."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = trained(optimizer)
            values = {i: divide(found, parameters[i]) for i, found in state["state"].items()}
            states.append({**state, "state": values})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def whole(value: Any) -> Any:
    """The whole of a tensor that is divided among processes, in each of them; anything else as it is.

    On the CPU, because a device that needs FSDP has no room for the whole.
    """
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def divide(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """An optimiser's state of one parameter with its moments divided like the parameter."""
    if not isinstance(parameter, DTensor):
        return state
    mesh, placements = parameter.device_mesh, parameter.placements
    return {
        name: distribute_tensor(value.to(parameter.device), mesh, placements)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in state.items()
    }


def shard(network: nn.Module, frozen: set[Tensor], calls: tuple[str, ...], device: torch.device) -> None:
    """Divide the changed parameters of a network in place.

    Args:
        frozen: parameters that neither the optimiser nor a moving average changes; they stay whole.
        calls: methods of the network, beside its forward, from which its parts are run.
    """
    # Nothing here writes in place into what a part returns, which this warns of at each of them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    world_size = torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (world_size,))
    for unit in units(network, set(network.parameters()) - frozen):
        fully_shard(unit, mesh=mesh, ignored_params=frozen)
    # Over parts that are all divided already, this lets them share one schedule of messages.
    fully_shard(network, mesh=mesh, ignored_params=frozen)
    for call in calls:
        register_fsdp_forward_method(network, call)


def units(network: nn.Module, changed: set[Tensor]) -> Iterator[nn.Module]:
    """The known units of a network, and each other module that itself owns a changed parameter."""
    inside: set[nn.Module] = set()
    for part in network.modules():
        if part in inside:
            continue
        if isinstance(part, UNITS):
            inside |= set(part.modules())
            if changed.isdisjoint(part.parameters()):
                continue
            yield part
        elif part is not network and not changed.isdisjoint(part.parameters(recurse=False)):
            yield part
