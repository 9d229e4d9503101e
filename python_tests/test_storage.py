"""Saving and loading with torch, safetensors, accelerate and the Hugging Face Hub."""

import copy
import io

import pytest
import torch
from torch import nn

import moco_ext
from moco_ext import KeyQueue, MoCo
from moco_ext.compat import lightly, moco, solo_learn

DIM, K = 8, 12


class Encoder(nn.Module):
    def __init__(self, num_classes: int = DIM) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def flattened() -> nn.Module:
    torch.manual_seed(1)
    net = Encoder()
    moco_ext.flatten_parameters_(net)
    return net


def updated_by_lightly() -> nn.Module:
    torch.manual_seed(1)
    model, ema = Encoder(), Encoder()
    lightly.update_momentum(model, ema, 0.9)
    return ema


def updated_by_solo_learn() -> nn.Module:
    torch.manual_seed(1)
    online, momentum = Encoder(), Encoder()
    solo_learn.initialize_momentum_params(online, momentum)
    return momentum


def model(seed: int = 1, **options) -> MoCo:
    torch.manual_seed(seed)
    made = MoCo(Encoder, DIM, K, **options)
    made.enqueue(torch.randn(5, DIM))
    return made


def official_shim() -> nn.Module:
    torch.manual_seed(1)
    return moco.builder.MoCo(Encoder, DIM, K)


MODULES = {
    "flattened": flattened,
    "lightly": updated_by_lightly,
    "solo-learn": updated_by_solo_learn,
    "MoCo": model,
    "MoCo with ids, empty, 16 bits": lambda: model(same_id="mask", empty=True, queue_dtype=torch.bfloat16),
    "official": official_shim,
    "queue": lambda: KeyQueue(DIM, K),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def changed(module: nn.Module) -> nn.Module:
    """A copy in which every tensor has other values, to load into."""
    other = copy.deepcopy(module)
    for tensor in [*other.parameters(), *other.buffers()]:
        tensor.data.add_(1)
    return other


def assert_same_state(got: nn.Module, want: nn.Module) -> None:
    state, other = got.state_dict(), want.state_dict()
    assert state.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(state[name], value), name


def saved_bytes(content: object) -> int:
    file = io.BytesIO()
    torch.save(content, file)
    return len(file.getvalue())


@modules
def test_torch(make, tmp_path):
    module = make()
    torch.save(module.state_dict(), tmp_path / "state.pth")
    other = changed(module)
    other.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert_same_state(other, module)


@modules
def test_safetensors(make, tmp_path):
    from safetensors.torch import load_file, load_model, save_file, save_model

    module = make()
    save_file(module.state_dict(), tmp_path / "file.safetensors")
    other = changed(module)
    other.load_state_dict(load_file(tmp_path / "file.safetensors"))
    assert_same_state(other, module)

    save_model(module, str(tmp_path / "model.safetensors"))
    other = changed(module)
    load_model(other, tmp_path / "model.safetensors")
    assert_same_state(other, module)


@modules
def test_accelerate(make, tmp_path):
    """``save_state`` saves a training run, ``save_model`` exports the weights."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import load_checkpoint_in_model

    accelerator = accelerate.Accelerator(cpu=True)
    module = make()
    prepared = accelerator.prepare(module)
    accelerator.save_state(str(tmp_path / "state"))
    want = copy.deepcopy(module)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.add_(1)
    accelerator.load_state(str(tmp_path / "state"))
    assert_same_state(module, want)

    accelerator.save_model(prepared, str(tmp_path / "model"))
    other = changed(module)
    load_checkpoint_in_model(other, str(tmp_path / "model"))
    assert_same_state(other, module)


def test_hugging_face_hub(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class HubMoCo(MoCo, hub.PyTorchModelHubMixin):
        def __init__(self, dim: int = DIM, K: int = K) -> None:
            super().__init__(Encoder, dim, K)

    torch.manual_seed(1)
    module = HubMoCo(K=7)
    module.update(torch.randn(3, DIM))
    module.save_pretrained(tmp_path)
    torch.manual_seed(2)
    again = HubMoCo.from_pretrained(tmp_path)
    assert again.K == 7
    assert_same_state(again, module)


def test_a_part_is_saved_without_the_rest():
    net = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2))
    alone = saved_bytes(net[1]), saved_bytes(net[1].state_dict())
    moco_ext.flatten_parameters_(net)
    assert (saved_bytes(net[1]), saved_bytes(net[1].state_dict())) == pytest.approx(alone, rel=0.1)


def test_state_dict_tensors_are_the_parameters():
    """Code that averages weights writes into ``state_dict()``. Only the queue, transposed, is a copy."""
    module = model()
    for name, value in module.state_dict().items():
        if name != "queue":
            value.fill_(3)
    assert all((p == 3).all() for p in module.parameters())
    assert module.queue_ptr.item() == 3
    queue = module.state_dict()["queue"]
    assert queue.is_contiguous()
    assert torch.equal(queue, module.queue.t())


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("contiguous", [False, True], ids=["a view, as saved before", "as published"])
def test_queues_of_either_layout_load(contiguous, assign, k):
    published = torch.randn(DIM, k)
    saved = published if contiguous else published.t().contiguous().t()
    queue = KeyQueue(DIM, k)
    file = io.BytesIO()
    torch.save({"queue": saved, "queue_ptr": torch.zeros(1, dtype=torch.long)}, file)
    file.seek(0)
    queue.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(queue.queue, published.t())
    assert queue.queue.is_contiguous()
    assert torch.equal(queue.state_dict()["queue"], published)


def test_without_flattening():
    torch.manual_seed(1)
    flat, loose = model(), model(flatten_parameters=False)
    loose.to(torch.float32)  # .to() flattens again, but not here
    for update in range(2):
        keys = torch.randn(5, DIM)
        for each in (flat, loose):
            with torch.no_grad():
                each.encoder_q.fc.weight.add_(1)
            addresses = [p.data_ptr() for p in loose.parameters()]
            each.update(keys)
            if each is loose:
                assert [p.data_ptr() for p in loose.parameters()] == addresses, update
    assert_same_state(loose, flat)
    starts = {p.data_ptr() - loose.encoder_q.conv.weight.data_ptr() for p in loose.encoder_q.parameters()}
    assert starts != {p.data_ptr() - flat.encoder_q.conv.weight.data_ptr() for p in flat.encoder_q.parameters()}
    with pytest.raises(ValueError, match="flatten_parameters: expected True with low_precision"):
        model(flatten_parameters=False, low_precision=torch.bfloat16)
