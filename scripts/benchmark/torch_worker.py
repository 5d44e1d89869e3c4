"""The benchmark's PyTorch worker. The first argument is a job as JSON; the last line of the output is the answer as JSON.

The networks are those of ``convert.reference`` (torchvision's, and the CIFAR family) or timm, in channels-last layout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark import common
from convert import installed, reference

Job = Mapping[str, Any]


def gemm(job: Job) -> dict[str, Any]:
    """Rate of a large matrix product."""

    def prepare(size: int) -> Callable[[], object]:
        a, b = (torch.randn(size, size, device=device(job), dtype=getattr(torch, job["precision"])) for _ in range(2))
        return lambda: (torch.mm(a, b), wait(job))

    return common.fastest_product(prepare)


def device(job: Job) -> str:
    """The device of the job."""
    if job["device"] == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        sys.exit("the installed torch finds no GPU")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, the default of XLA, and of cuDNN for convolutions
    return "cuda"


def wait(job: Job) -> None:
    """Waits until an accelerator is done. On a CPU a call returns when the work is done."""
    if job["device"] != "cpu":
        torch.cuda.synchronize()


def load(job: Job) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """The row's network, its weights, images (NHWC in memory) and labels."""
    arch, config = job["arch"], common.configuration(job)
    if job["contestant"] == "timm":
        installed.import_torchvision()  # timm imports it
        import timm

        if config.stem != "imagenet" or not timm.is_model(arch):
            sys.exit(f"timm has no {arch} with the {config.stem} stem")
        model = timm.create_model(arch, num_classes=config.num_classes, in_chans=config.in_channels)
    else:
        model = reference.network(arch, config)
    images, labels, values = common.inputs(job)
    tensors = {key: torch.from_numpy(value) for key, value in values.items()}
    model.load_state_dict(tensors, strict=True)
    model = model.to(device(job), memory_format=torch.channels_last)
    # An NCHW view of NHWC memory is channels-last.
    batch = torch.from_numpy(images).to(device(job)).permute(0, 3, 1, 2)
    return model, tensors, batch, torch.from_numpy(labels).long().to(device(job))


def compiled(model: nn.Module, job: Job) -> Callable[[Tensor], Tensor]:
    """The network, compiled for "torch-compile": with frozen weights in inference, and as CUDA graphs on a GPU."""
    if job["contestant"] != "torch-compile":
        return model
    import torch._inductor.config

    torch._inductor.config.freezing = not model.training
    return torch.compile(model, mode="default" if job["device"] == "cpu" else "reduce-overhead")


def autocast(job: Job) -> torch.autocast:
    return torch.autocast(device(job), torch.bfloat16, enabled=job["precision"] == "bfloat16")


def measure(job: Job) -> dict[str, Any]:
    """Measures a row."""
    found = {"infer": infer, "epoch": epoch}.get(job["task"], training)(job)
    if job["contestant"] == "torch-compile":
        found["compile_seconds"] = found["first_step_seconds"]
    return found | ({} if job["device"] == "cpu" else {"device_bytes": torch.cuda.max_memory_allocated()})


def infer(job: Job) -> dict[str, Any]:
    """Inference on a batch on the device."""
    model, _, images, _ = load(job)
    forward = compiled(model.eval(), job)

    @torch.inference_mode()
    def run(steps: int) -> Tensor:
        with autocast(job):
            for _ in range(steps):
                logits = forward(images)
        wait(job)
        return logits

    found = common.pace(job, run, len(images)) | {"note": layout(model, images)}
    if job["check"]:
        logits = run(1)[: common.CHECKED_IMAGES].float().cpu().numpy()
        found["error"] = common.relative_error(job, {"logits": logits})
    return found


def layout(model: nn.Module, images: Tensor) -> str:
    """Memory layout of the images and all kernels."""
    tensors = [images, *(value for value in model.parameters() if value.ndim == 4)]
    last = all(value.is_contiguous(memory_format=torch.channels_last) for value in tensors)
    return "channels-last" if last else "channels-first"


def training(job: Job) -> dict[str, Any]:
    """SGD steps on a batch on the device."""
    model, tensors, images, labels = load(job)
    step = stepper(model, job)

    def run(steps: int) -> None:
        for _ in range(steps):
            step(images, labels)
        wait(job)

    found = common.pace(job, run, len(images)) | {"note": layout(model, images)}
    if job["check"]:
        model.load_state_dict(tensors)
        run(1)
        gradient = {name: value.grad.cpu().numpy() for name, value in model.named_parameters()}  # type: ignore[union-attr]
        found["error"] = common.relative_error(job, gradient)
    return found


def stepper(model: nn.Module, job: Job) -> Callable[[Tensor, Tensor], None]:
    """A function that runs a training step. The gradients are kept until the next step."""
    optimizer = torch.optim.SGD(model.parameters(), common.LR, **common.SGD, fused=True)
    forward = compiled(model.train(), job)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        with autocast(job):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


def epoch(job: Job) -> dict[str, Any]:
    """Epochs of random uint8 images on the device: crops of padded images, flips, normalisation, training steps."""
    (model, *_), size, count, where = load(job), job["size"], job["epoch"], device(job)
    step, along, steps = stepper(model, job), torch.arange(size, device=where), count // job["batch"]
    padded = torch.randint(0, 256, (count, size + 8, size + 8, 3), dtype=torch.uint8, device=where)
    labels = torch.randint(0, job["config"]["num_classes"], (count,), device=where)
    mean, std = (torch.tensor(value, device=where) for value in ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]))

    def run(epochs: int) -> None:
        for _ in range(epochs):
            order = torch.randperm(count, device=where)[: steps * job["batch"]].view(steps, -1)
            corners = torch.randint(0, 9, (*order.shape, 2), device=where)
            turned = torch.rand(order.shape, device=where) < 0.5
            for chosen, corner, turn in zip(order, corners, turned, strict=True):
                rows = corner[:, :1] + along
                columns = corner[:, 1:] + torch.where(turn[:, None], along.flip(0), along)
                views = padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
                step(((views - mean) / std).permute(0, 3, 1, 2), labels[chosen])
        wait(job)

    return common.pace(job, run, steps * job["batch"]) | {"note": layout(model, padded.permute(0, 3, 1, 2))}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    try:
        answer = {"gemm": gemm, "measure": measure}[asked["do"]](asked)
    except LookupError as error:  # no such network
        sys.exit(str(error))
    assert "jax" not in sys.modules
    print(json.dumps(answer))
