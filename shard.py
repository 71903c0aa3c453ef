"""Sharded training: weights, gradients and AdamW's moments shared out over the processes, by PyTorch's FSDP2.

    torchrun --nproc_per_node=8 train.py config/7b.py    --shard is in the file
    python shard.py out/7b model.pt                      a checkpoint that lies in parts, as one file

What is notable here:
* Every pass of every block is a collective: its weights are gathered before, its gradients reduced after. How
  many passes there are depends on the data. So the processes agree, at each pass's one host sync, whether any
  of them has live tokens; one that has none makes the pass with no rows (`States.select`).
* No gradient is kept whole: each backward of a block reduces at once, each process keeps its share in fp32.
* A checkpoint is one file, which process 0 writes, up to WHOLE bytes. A larger one is a small file that names
  a folder, where each process writes its part (PyTorch's distributed checkpoint). Any number of processes
  resumes from either, and a folder is complete before a file names it: a kill at any moment costs nothing.
"""

from common import answer_help

answer_help(__file__)

import io
import os
import pickle
import shutil
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import (BadInput, check_output, check_tensor, configure, load_checkpoint, reason, run,
                    save_checkpoint, unusable)
from model import LLaMA

WHOLE = 2**35  # bytes of a checkpoint that is still one file: 2.8B parameters with their moments


def shard(model: LLaMA, device: torch.device, dtype: torch.dtype) -> None:
    """Shares out the model, which every process has built alike, and moves its share to the device.

    Blocks are gathered in dtype, which is that of their products; embedding, head, final norm and router in
    fp32, once in a forward, as the router must be exact. Inputs keep their dtype: the residual stream is
    fp32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = None if dtype is torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    model.agree = agree
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # logits are a view; nobody changes it
    warnings.filterwarnings("ignore", message="Mismatch dtype between input")  # norms: weights are bf16


def agree(count: Tensor) -> None:
    """Makes count (1,) the largest of all processes."""
    dist.all_reduce(count, dist.ReduceOp.MAX)


def local(tensor: Tensor) -> Tensor:
    """The share of a tensor that this process holds; all of one that is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tree):
    """A state dict whose shared tensors are whole and on the CPU in process 0, and None in the others.

    All processes must call it: they gather one tensor after the other.
    """
    if isinstance(tree, dict):
        return {name: gathered(value) for name, value in tree.items()}
    if not isinstance(tree, DTensor):
        return tree
    tensor = tree.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None


def share_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, shared out as `like` is; needs no communication."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def load_whole(model: LLaMA, optimizer: torch.optim.Optimizer, weights: dict, moments: dict) -> None:
    """Puts whole state dicts into a model and an optimizer that may be shared out."""
    own = model.state_dict()
    model.load_state_dict({name: share_out(tensor, own[name]) for name, tensor in weights.items()})
    parameters = parameters_of(optimizer)
    state = {}
    for i, found in moments["state"].items():
        shaped = [name for name, value in found.items() if isinstance(value, Tensor) and value.dim()]
        state[i] = found | {name: share_out(found[name], parameters[i]) for name in shaped}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})  # its settings are the run's own


# ------------------------------------------------------------------------------------- checkpoints in parts


def named_tensors(model: LLaMA, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that they have in a folder of parts."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, parameter in enumerate(parameters_of(optimizer) if optimizer else []):
        for name, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{i}.{name}"] = tensor
    return tensors


def save_shared(path: Path, model: LLaMA, tokenizer, optimizer: torch.optim.Optimizer | None = None,
                **rest) -> None:
    """save_checkpoint for a model that is shared out. All processes must call it; path must be the same disk.

    Beyond WHOLE bytes the tensors go into a folder beside path, path.stem.a or .b: the one that the file at
    path does not name. Renaming the new file over it is the moment at which the new checkpoint counts.
    """
    tensors = named_tensors(model, optimizer)
    if sum(tensor.nbytes for tensor in tensors.values()) <= WHOLE:
        if optimizer:
            rest["optimizer"] = gathered(optimizer.state_dict())
        weights = gathered(model.state_dict())
        if dist.get_rank() == 0:
            save_checkpoint(path, model, tokenizer, weights, **rest)
        return
    chosen = [None]
    if dist.get_rank() == 0:
        used = read_used(path)
        chosen = [f"{path.stem}.b" if used == f"{path.stem}.a" else f"{path.stem}.a"]
        shutil.rmtree(path.with_name(chosen[0]), ignore_errors=True)  # what a killed run left
    dist.broadcast_object_list(chosen)
    folder = path.with_name(chosen[0])
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except (Exception, dcp.CheckpointException) as error:  # the latter is none of the former
        raise BadInput(f"{folder} cannot be written: {first_reason(error)}") from None
    if dist.get_rank() == 0:
        if optimizer:
            rest["optimizer"] = optimizer.state_dict() | {"state": {}}
        save_checkpoint(path, model, tokenizer, {}, parts=folder.name, **rest)


def read_used(path: Path) -> str | None:
    """The folder of parts that the checkpoint at path names, if there is one and it does."""
    if not path.exists():
        return None
    return torch.load(path, map_location="meta", weights_only=True).get("parts")


class Reader(dcp.FileSystemReader):
    """Reads a folder of parts without running code that it may hold: its index is a pickle."""

    def read_metadata(self, *arguments, **named) -> dcp_metadata.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = Index(file).load()
        metadata.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return metadata

    def _slice_file(self, file, where: _StorageInfo):
        """A tensor's bytes: an archive, whose checksums torch.load does not compare."""
        content = io.BytesIO(super()._slice_file(file, where).read())
        with zipfile.ZipFile(content) as archive:
            if archive.testzip():
                raise ValueError(f"the checksum of a tensor in {where.relative_path} is wrong")
        content.seek(0)
        return content


class Index(pickle.Unpickler):
    """Knows the plain records of an index of tensors, and nothing else."""

    known = {
        (kind.__module__, kind.__qualname__): kind
        for kind in (dcp_metadata.Metadata, dcp_metadata.MetadataIndex, dcp_metadata.TensorStorageMetadata,
                     dcp_metadata.TensorProperties, dcp_metadata.ChunkStorageMetadata,
                     dcp_metadata.StorageMeta, dcp_metadata._MEM_FORMAT_ENCODING, _StorageInfo, torch.Size)}

    def find_class(self, module: str, name: str):
        if (module, name) in self.known:
            return self.known[module, name]
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where the folder lay: not read
        if module == "torch.serialization" and name == "_get_layout":
            return torch.serialization._get_layout
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds code: {module}.{name}")


def load_parts(folder: Path, tensors: dict[str, Tensor], together: bool) -> None:
    """Fills tensors, named as named_tensors does, from a folder of parts. Raises BadInput.

    together: all processes call it, and each reads its share; else this process alone reads all.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process alone reads is meant
            reader = Reader(folder)
            reader.read_metadata()  # dcp.load would look elsewhere after a failure, and say so
            dcp.load(tensors, storage_reader=reader, no_dist=not together)
    except (Exception, dcp.CheckpointException) as error:  # of any kind, as the bytes may be any
        what = unusable(error, "is corrupt, or parts of it are missing")
        raise BadInput(f"{folder} {what}: {first_reason(error)}") from None
    for name, tensor in tensors.items():
        check_tensor(f"{folder}: {name}", local(tensor), local(tensor))


def first_reason(error: BaseException) -> str:
    """What went wrong in the first of the processes in which something did."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason(error)


def resume_parts(folder: Path, model: LLaMA, optimizer: torch.optim.Optimizer, begun: bool) -> None:
    """Fills a model and its optimizer, shared out or not. begun: whether a step was done, so that there are
    moments. Raises BadInput.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        raise BadInput(f"{folder}: from a checkpoint in parts only AdamW can go on, as its moments are known")
    trained = [parameter for parameter in parameters_of(optimizer) if parameter.requires_grad]
    for parameter in trained if begun else []:
        count = torch.zeros((), device=local(parameter).device)
        zeros = [torch.zeros_like(parameter.detach()) for _ in range(2)]
        optimizer.state[parameter] = {"step": count, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    tensors = named_tensors(model, optimizer)
    load_parts(folder, tensors, together=any(isinstance(tensor, DTensor) for tensor in tensors.values()))


# --------------------------------------------------------------------------------------------------- command


@dataclass
class Join:
    run: str = ""  # folder of a run whose checkpoint lies in parts, or its file
    file: str = ""  # the one file to write: the model, as sample.py and eval.py read it


def main() -> None:
    config = configure(Join, positional=("run", "file"))
    if not config.run or not config.file:
        raise BadInput("want the folder of a run and the file to write: python shard.py out/7b model.pt")
    if os.path.exists(config.file):
        raise BadInput(f"{config.file} exists already: name a new file")
    check_output(config.file, "file")
    model, tokenizer, checkpoint = load_checkpoint(config.run)
    rest = {name: value for name, value in checkpoint.items()
            if name not in ("format", "config", "model", "tokenizer", "ranks", "optimizer", "parts")}
    save_checkpoint(config.file, model, tokenizer, **rest)
    print(f"{config.file}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters in one file")


if __name__ == "__main__":
    run(main)
