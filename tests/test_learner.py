import copy
import inspect
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from byol_pytorch import BYOL
from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD

DIM, OUT, HIDDEN = 12, 6, 20


def backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, DIM, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(DIM, 10),
    )


def wrap(net: nn.Module | None = None, **options) -> BYOL:
    options = {"projection_size": OUT, "projection_hidden_size": HIDDEN} | options
    return BYOL(backbone() if net is None else net, 16, **options)


def two_views(batch: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 16, 16), torch.randn(batch, 3, 16, 16)


def uint8_images(batch: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 24, 20), dtype=torch.uint8)


class PlainBYOL:
    """The paper's algorithm 1 on given views, in float64, with torch alone."""

    def __init__(self, model: BYOL, base: float, total: int) -> None:
        self.online = copy.deepcopy(model.net[:-1]).double()
        self.project = copy.deepcopy(model.projector).double()
        self.predict = copy.deepcopy(model.predictor).double()
        self.target = copy.deepcopy(self.online)
        self.target_project = copy.deepcopy(self.project)
        self.base, self.total, self.k = base, total, 0
        modules = (self.online, self.project, self.predict)
        self.parameters = [p for m in modules for p in m.parameters()]
        self.momenta = [torch.zeros_like(p) for p in self.parameters]

    def step(self, v: torch.Tensor, w: torch.Tensor) -> float:
        v, w = v.double(), w.double()
        q_v = self.predict(self.project(self.online(v)))
        q_w = self.predict(self.project(self.online(w)))
        z_v = self.target_project(self.target(v)).detach()
        z_w = self.target_project(self.target(w)).detach()
        loss = 0
        for q, z in ((q_v, z_w), (q_w, z_v)):
            loss = loss + (2 - 2 * (q * z).sum(1) / (q.norm(dim=1) * z.norm(dim=1))).mean()
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for p, m, g in zip(self.parameters, self.momenta, gradients, strict=True):
                m.mul_(0.9).add_(g)
                p.sub_(0.05 * m)
            turn = torch.cos(torch.tensor(torch.pi * self.k / self.total, dtype=torch.float64))
            tau = 1 - (1 - self.base) * (turn.item() + 1) / 2
            sources = [*self.online.parameters(), *self.project.parameters()]
            copies = [*self.target.parameters(), *self.target_project.parameters()]
            for xi, theta in zip(copies, sources, strict=True):
                xi.copy_(tau * xi + (1 - tau) * theta)
        self.k += 1
        return loss.item()


def test_three_steps_equal_a_plain_byol_in_float64():
    model = wrap(moving_average_decay=0.9, total_steps=5)
    plain = PlainBYOL(model, 0.9, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        views = two_views()
        loss = model(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_moving_average()
        assert loss.item() == pytest.approx(plain.step(*views), abs=1e-5)
    for ours, theirs in (
        (model.net[:-1], plain.online),
        (model.projector, plain.project),
        (model.predictor, plain.predict),
        (model.target.net[:-1], plain.target),
        (model.target.projector, plain.target_project),
    ):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(model.net[1].running_mean.double(), plain.online[1].running_mean)


def test_the_target_runs_before_the_online_network_and_leaves_its_draws_alone():
    net = nn.Sequential(*backbone()[:-1], nn.Dropout(0.5), nn.Linear(DIM, 10))
    model, ran, views = wrap(net), [], two_views()
    torch.manual_seed(1)
    projections = [model.projector(model.representation(v, normalise=False)) for v in views]
    predicted = [model.predictor(z) for z in projections]
    with torch.no_grad():
        goals = [model.target(v) for v in views]
    cosines = [F.cosine_similarity(predicted[i], goals[1 - i]).mean() for i in (0, 1)]
    model.net.register_forward_hook(lambda *_: ran.append("online"))
    model.target.net.register_forward_hook(lambda *_: ran.append("target"))
    torch.manual_seed(1)
    loss = model(*views).item()
    assert loss == pytest.approx(4 - 2 * sum(c.item() for c in cosines), abs=1e-5)
    assert ran == ["target", "target", "online", "online"]


def test_loss_is_a_float32_scalar_between_zero_and_eight():
    loss = wrap()(uint8_images())
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert 0 <= loss.item() <= 8


def test_gradient_reaches_all_but_the_classifier():
    model = wrap()
    model(*two_views()).backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"net.6.weight", "net.6.bias"} == set(model.ddp_ignored())
    assert set(model.ddp_ignored("learner.")) == {"learner.net.6.weight", "learner.net.6.bias"}


def test_optimizers_leave_the_classifier_as_it_is():
    model = wrap()
    before = copy.deepcopy(model.net[6].state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    model(*two_views()).backward()
    optimizer.step()
    torch.testing.assert_close(model.net[6].state_dict(), before, rtol=0, atol=0)


def test_arguments_are_in_the_order_of_byol_pytorch_0_9_1():
    names = list(inspect.signature(BYOL.__init__).parameters)[1:15]
    assert names == [
        "net", "image_size", "hidden_layer", "projection_size", "projection_hidden_size",
        "augment_fn", "augment_fn2", "moving_average_decay", "use_momentum", "sync_batchnorm",
        "use_simplicial_embeddings", "sem_num_simplices", "sem_simplex_dim", "sem_temperature",
    ]  # fmt: skip


def test_a_script_written_for_0_9_1_runs_unchanged():
    resnet = backbone()
    learner = BYOL(resnet, image_size=24, hidden_layer=-3)  # its children()[-3]: the pooling
    opt = torch.optim.Adam(learner.parameters(), lr=3e-4)
    for _ in range(2):
        loss = learner(torch.randn(4, 3, 24, 24))
        opt.zero_grad()
        loss.backward()
        opt.step()
        learner.update_moving_average()
    imgs = torch.rand(2, 3, 24, 24)
    projection, embedding = learner(imgs, return_embedding=True)
    assert projection.shape == (2, 256)
    assert embedding.shape == (2, DIM)
    for returned in (learner(imgs, True)[1], learner(imgs, True, False)):
        assert returned.shape == (2, DIM)
    assert learner(imgs, return_embedding=True, return_projection=False).shape == (2, DIM)


def test_views_come_from_the_first_and_the_second_augmentation_in_this_order():
    model = wrap(augment_fn=lambda x: x, augment_fn2=lambda x: x + 1)
    images = torch.rand(4, 3, 16, 16)
    one, two = model.views(images)
    assert torch.equal(one, images)
    assert torch.equal(two, images + 1)
    assert model(images).item() == pytest.approx(model(images, images + 1).item(), abs=1e-5)


def test_second_augmentation_falls_back_to_a_given_first():
    calls = []
    model = wrap(augment_fn=lambda x: calls.append(1) or x)
    model.views(torch.rand(4, 3, 16, 16))
    assert calls == [1, 1]


def test_an_empty_sequential_is_an_augmentation_and_not_none():
    model = wrap(augment_fn=nn.Sequential())
    images = torch.rand(4, 3, 16, 16)
    assert all(torch.equal(view, images) for view in model.views(images))


def test_users_augmentation_is_given_floats_between_zero_and_one():
    seen = []
    model = wrap(augment_fn=lambda x: seen.append(x) or x[..., :16, :16])
    model.views(uint8_images())
    assert all(x.dtype == torch.float32 and 0 <= x.min() <= x.max() <= 1 for x in seen)


def test_default_views_differ_by_view_and_image_and_have_no_gradient():
    model = wrap()
    one, two = model.views(uint8_images(1).expand(6, -1, -1, -1))
    assert one.shape == two.shape == (6, 3, 16, 16)
    assert not one.requires_grad
    everything = torch.cat((one, two)).flatten(1)
    assert torch.cdist(everything, everything).add(torch.eye(12) * 99).min() > 1e-3


def test_the_network_sees_in_use_what_it_saw_in_training():
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = backbone(), []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x.detach())
            return self.net(x)

    model = wrap(Recorder())
    images = uint8_images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.double() / 255 - mean) / std
    model.representation(images)
    torch.testing.assert_close(model.net.seen[-1], expected.float(), atol=1e-5, rtol=1e-5)
    model(images.float() / 255, return_embedding=True)
    torch.testing.assert_close(model.net.seen[-1], expected.float(), atol=1e-5, rtol=1e-5)
    model.representation(images, normalise=False)
    torch.testing.assert_close(model.net.seen[-1], images / 255)
    one, two = two_views()
    model(one, two)
    assert torch.equal(model.net.seen[-2], one)
    assert torch.equal(model.net.seen[-1], two)
    own = wrap(Recorder(), augment_fn=lambda x: x[..., :16, :16])
    own.representation(images)
    torch.testing.assert_close(own.net.seen[-1], images / 255)


def test_mean_and_std_are_arguments_for_any_channel_count():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = wrap(net, mean=(0.5, 0.25), std=(0.5, 2.0))
    images = torch.rand(3, 2, 16, 16)
    mean, std = torch.tensor([0.5, 0.25]).view(2, 1, 1), torch.tensor([0.5, 2.0]).view(2, 1, 1)
    torch.testing.assert_close(model.representation(images), net((images - mean) / std))
    assert model(images).isfinite()


def test_without_momentum_the_target_is_the_online_network_with_stop_gradient():
    model = wrap(use_momentum=False)
    assert model.target is None
    assert not any(k.startswith("target.") for k in model.state_dict())
    one, two = two_views()
    plain = copy.deepcopy(model)
    z = [plain.projector(plain.net[:-1](v)) for v in (one, two)]
    p = [plain.predictor(x) for x in z]
    expected = 4 - 2 * (
        F.cosine_similarity(p[0], z[1].detach()).mean()
        + F.cosine_similarity(p[1], z[0].detach()).mean()
    )
    loss = model(one, two)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(model.net[0].weight.grad, plain.net[0].weight.grad)


def test_concatenated_views_share_their_batch_statistics():
    model = wrap(concatenate_views=True)
    one, two = two_views()
    separate = wrap(copy.deepcopy(model.net))
    separate.load_state_dict(model.state_dict())
    joint = torch.cat((one, two))
    plain = copy.deepcopy(model)
    q = plain.predictor(plain.projector(plain.net[:-1](joint))).chunk(2)
    z = plain.target.projector(plain.target.net[:-1](joint)).detach().chunk(2)
    expected = 4 - 2 * (
        F.cosine_similarity(q[0], z[1]).mean() + F.cosine_similarity(q[1], z[0]).mean()
    )
    assert model(one, two).item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(separate(one, two).item() - expected.item()) > 1e-4


def test_simplicial_embeddings_are_off_by_default_and_an_option():
    assert len([m for m in wrap().projector.modules() if isinstance(m, nn.Linear)]) == 2
    model = wrap(use_simplicial_embeddings=True, sem_num_simplices=4, sem_simplex_dim=5)
    assert model(*two_views()).isfinite()
    assert model.projector[0](torch.randn(4, DIM)).shape == (4, 20)


def test_state_dict_round_trip_continues_exactly():
    def train(model: BYOL, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
        losses = []
        for seed in seeds:
            torch.manual_seed(seed)
            loss = model(uint8_images())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_moving_average()
            losses.append(loss.item())
        return losses

    first = wrap(total_steps=9)
    opt = torch.optim.AdamW(first.parameters())
    train(first, opt, range(3))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "opt": opt.state_dict()}, file)
    second = wrap(total_steps=9)
    opt2 = torch.optim.AdamW(second.parameters())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    opt2.load_state_dict(saved["opt"])
    assert second.moving_average_decay == first.moving_average_decay
    assert train(second, opt2, range(3, 6)) == train(first, opt, range(3, 6))
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_step_is_saved_as_an_int64_scalar_on_the_cpu():
    model = wrap()
    model.update_moving_average()
    step = model.state_dict()["_extra_state"]
    assert (step.dtype, step.shape, step.device.type, step.item()) == (torch.int64, (), "cpu", 1)


def test_gradient_accumulation_equals_the_sum_of_the_parts():
    model = wrap(backbone().eval())  # no batch statistics in the backbone: parts are independent
    model.projector.eval()
    model.predictor.eval()
    model.target.eval()
    one, two = two_views(8)
    whole = copy.deepcopy(model)
    whole(one, two).backward()
    for a, b in zip(one.chunk(2), two.chunk(2), strict=True):
        (model(a, b) / 2).backward()
    torch.testing.assert_close(model.net[0].weight.grad, whole.net[0].weight.grad)


def test_bfloat16_autocast_stays_close_to_float32_and_gives_a_float32_loss():
    model = wrap()
    one, two = two_views(16)
    expected = copy.deepcopy(model)(one, two)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(one, two)
        from_images = model(uint8_images())
    loss.backward()
    assert loss.dtype == from_images.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=0.1)
    assert model.net[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_another_dtype_train_and_embed(dtype):
    model = wrap(backbone().to(dtype))
    loss = model(uint8_images())
    loss.backward()
    model.update_moving_average()
    assert model.representation(uint8_images()).dtype == dtype
    assert loss.dtype == torch.float32


def test_channels_last_gives_the_same_loss():
    model = wrap()
    one, two = two_views()
    expected = copy.deepcopy(model)(one, two).item()
    model.to(memory_format=torch.channels_last)
    one, two = (v.to(memory_format=torch.channels_last) for v in (one, two))
    assert model(one, two).item() == pytest.approx(expected, abs=1e-5)


def test_gradient_checkpointing_of_the_backbone_changes_nothing():
    class Checkpointed(nn.Module):
        def __init__(self, layers: nn.Sequential) -> None:
            super().__init__()
            self.layers, self.on = layers, False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.on:
                return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)
            return self.layers(x)

    layers = backbone()
    layers[1] = nn.GroupNorm(2, 8)  # batch norm would count the recomputation
    model = wrap(Checkpointed(layers))
    plain = copy.deepcopy(model)
    model.net.on = True
    views = two_views()
    model(*views).backward()
    plain(*views).backward()
    torch.testing.assert_close(model.net.layers[0].weight.grad, plain.net.layers[0].weight.grad)


def test_other_heads_are_assigned_and_followed_after_a_reset():
    model = wrap()
    model.projector = nn.Sequential(nn.Linear(DIM, 9), nn.LayerNorm(9))
    model.predictor = nn.Linear(9, 9)
    model.reset_moving_average()
    loss = model(torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16))  # no batch norm: one is fine
    loss.backward()
    model.update_moving_average()
    assert model.target.projector[0].weight.shape == (9, DIM)


def test_a_few_steps_lower_the_loss_on_fixed_views():
    model = wrap(moving_average_decay=0.99)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    views = two_views(16)
    losses = []
    for _ in range(15):
        loss = model(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_moving_average()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gpu
def test_fp16_with_grad_scaler_trains_on_cuda():
    model = wrap().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler()
    for _ in range(3):
        with torch.autocast("cuda", torch.float16):
            loss = model(uint8_images(32).cuda())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_moving_average()
    assert loss.isfinite()


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_device():
    model = wrap().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    images = uint8_images(32).cuda()
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            loss = model(images)
            loss.backward()
            optimizer.step()
            model.update_moving_average()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
