"""KD3's invariants: what each part adds, and what is left when it is switched off."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.types import Batch, InputSpec, Loss, Step
from vestige.errors import RecipeError, TeacherError
from vestige.methods.kd import KD, KDConfig
from vestige.methods.kd3 import KD3, KD3Config
from vestige.models.alignment import AlignedClassifier
from vestige.plugins.retain import Retain, RetainConfig
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
TASK = Classification(SPEC, 3)
ROWS = 8
SMALL = {"rounds": 3, "iterations": 3, "batch_size": ROWS, "head_dim": 4, "warm_rows": 4}
PLAIN = {
    "selection": "off",
    "feature_weight": 0,
    "classifier_weight": 0,
    "contrastive_weight": 0,
    "consistency_weight": 0,
}


class Recorder(RunContext):
    """Keeps the batches that the student's updates get, with the teacher's share meanwhile."""

    def __init__(self, **plugins: Any) -> None:
        super().__init__(
            seed=0,
            device=torch.device("cpu"),
            plugins=plugins,
            reduce=lambda params: None,
            on_loop=lambda name, n: 0,
            on_round=lambda: True,
        )
        self.batches: list[Batch] = []

    def update(self, role: Any, model: Any, loss_fn: Any, batch: Batch, *given: Any, **more: Any):
        self.batches.append(batch)
        return super().update(role, model, loss_fn, batch, *given, **more)


def heap(rows: int = 40) -> TensorSource:
    images = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    # Of very different contrast, so that the teacher is sure of some only.
    images *= torch.linspace(0.1, 4, rows)[:, None, None, None]
    return TensorSource(images, origin="foreign", name="heap")


def make(teacher: nn.Module, student: nn.Module, source: Any = None, **settings: Any) -> KD3:
    torch.manual_seed(0)  # decides the weights of projection and head
    cfg = KD3Config(**{**SMALL, **settings})
    sources = {"foreign": source or heap()}
    return KD3(cfg, TASK, [WhiteBoxTeacher(teacher)], student, sources)


def run(method: KD3, **plugins: Any) -> tuple[list[Step], Recorder]:
    ctx = Recorder(**plugins)
    for plugin in plugins.values():
        plugin.setup(TASK, [method.teacher], method.student, ctx)
    return list(method.run(ctx)), ctx


def train(method: Any, **given: Any) -> Any:
    trainer = Trainer(
        method,
        TASK,
        teachers=[method.teacher],
        student=method.student,
        config=TrainerConfig(device="cpu", log_every=1),
        **given,
    )
    return trainer.run()


def loss_of(method: KD3, batch: Batch) -> tuple[Loss, dict[str, Tensor]]:
    """The loss of a student with its aligned layer, and the weights of that layer."""
    with method.alignment:
        layer = method.student[5]
        assert isinstance(layer, AlignedClassifier)
        return method.imitation(method.student, batch), layer.state_dict()


def images(rows: int = 6, seed: int = 3) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


# What is left when parts are off


@pytest.mark.parametrize("augmented", [{}, {"crop_padding": 0, "flip": False}])
def test_without_its_parts_it_is_plain_distillation_bit_for_bit(
    augmented, tiny_teacher, dropout_student
):
    shared = {"rounds": 3, "iterations": 4, "batch_size": ROWS, "crop_padding": 4, "flip": True}
    shared |= augmented
    students = [copy.deepcopy(dropout_student) for _ in range(2)]
    methods = [
        KD3(
            KD3Config(**shared, **PLAIN),
            TASK,
            [WhiteBoxTeacher(tiny_teacher)],
            students[0],
            {"foreign": heap()},
        ),
        KD(
            KDConfig(**shared),
            TASK,
            [WhiteBoxTeacher(copy.deepcopy(tiny_teacher))],
            students[1],
            {"inputs": heap()},
        ),
    ]
    outcomes = [train(method) for method in methods]
    assert outcomes[0].teacher_queries == outcomes[1].teacher_queries == 12 * ROWS
    first, second = (student.state_dict() for student in students)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "terms", "variant"),
    [
        ({}, {"distillation", "features", "classifier", "contrast", "consistency"}, ""),
        ({"selection": "off"}, {"distillation", "features", "classifier", "contrast",
                                "consistency"}, "no selection"),
        ({"feature_weight": 0}, {"distillation", "classifier", "contrast", "consistency"},
         "no feature alignment"),
        ({"classifier_weight": 0}, {"distillation", "features", "contrast", "consistency"},
         "no classifier alignment"),
        ({"feature_weight": 0, "classifier_weight": 0},
         {"distillation", "contrast", "consistency"}, "no alignment"),
        ({"contrastive_weight": 0}, {"distillation", "features", "classifier", "consistency"},
         "no contrast"),
        ({"consistency_weight": 0}, {"distillation", "features", "classifier", "contrast"},
         "no consistency"),
        ({"contrastive_weight": 0, "consistency_weight": 0},
         {"distillation", "features", "classifier"}, "no MixDistribution"),
        ({"selection": "epoch", "teacher_share_end": 1},
         {"distillation", "features", "classifier", "contrast", "consistency"},
         "selection per epoch, selection by the teacher alone"),
        ({"tie_classifier": True, "split_bn": True},
         {"distillation", "features", "classifier", "contrast", "consistency"},
         "tied classifier, split BN"),
        (PLAIN, {"distillation"}, "no selection, no alignment, no MixDistribution"),
    ],
)  # fmt: skip
def test_each_part_is_its_own_switch(settings, terms, variant, tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, **settings)
    assert method.variant() == variant
    steps, ctx = run(method)
    assert all(set(step.loss.terms) == terms for step in steps)
    mixes = bool(terms & {"contrast", "consistency"})
    assert all(("perturbed" in batch.extra) == mixes for batch in ctx.batches)
    assert set(method.parts()) - {"student", "selector", "looks"} == (
        {"head"} if "contrast" in terms else set()
    )


# The loss


def test_the_loss_is_the_sum_of_its_terms_as_they_are_defined(tiny_teacher, tiny_student):
    method = make(
        tiny_teacher,
        tiny_student.eval(),
        temperature=3.0,
        feature_weight=0.7,
        classifier_weight=0.3,
        contrastive_weight=0.2,
        consistency_weight=0.4,
    )
    with torch.no_grad():  # apart from the teacher's, where it starts
        method.alignment._aligned.classifier.weight.add_(0.1)
    inputs, views = images(), images(seed=4)
    weights = torch.tensor([2.0, 0.5, 1.0, 0.0, 1.5, 1.0])
    batch = Batch(inputs, extra={"perturbed": views}).weighted(weights)
    loss, layer = loss_of(method, batch)

    projection, classifier = layer["projection.weight"], layer["classifier.weight"]
    logits, projected, points = {}, {}, {}
    for name, seen in (("clean", inputs), ("mixed", views)):
        features = tiny_student[:5](seen)
        projected[name] = features @ projection.t()
        logits[name] = projected[name] @ classifier.t() + layer["classifier.bias"]
        points[name] = method.head(features)
    wanted, of_teacher = tiny_teacher(inputs), tiny_teacher[:5](inputs)

    def kl(answer: Tensor) -> Tensor:
        p, q = (F.softmax(values / 3, 1) for values in (wanted, answer))
        return 9 * (p * (p / q).log()).sum(1)

    columns = tiny_teacher[5].weight.square().sum(0).sqrt()
    apart = F.normalize(projected["clean"], dim=1) - F.normalize(of_teacher, dim=1)
    gap = (classifier - tiny_teacher[5].weight).square().mean()
    every = torch.cat([points["clean"], points["mixed"]])
    contrast = []
    for row in range(12):
        alike = (every @ every[row] / 0.5).exp()
        others = alike.sum() - alike[row]
        contrast.append(-(alike[(row + 6) % 12] / others).log())
    slow = {
        "distillation": (weights * kl(logits["clean"])).mean(),
        "features": (weights * (columns / columns.mean() * apart).square().sum(1)).mean(),
        "classifier": weights.mean() * gap,
        "contrast": (weights * (torch.stack(contrast[:6]) + torch.stack(contrast[6:])) / 2).mean(),
        "consistency": (weights * kl(logits["mixed"])).mean(),
    }
    assert gap > 1e-3
    for name, value in slow.items():
        # Sums of float32 in another order.
        torch.testing.assert_close(loss.terms[name], value, rtol=1e-4, atol=1e-6)
    factors = {"distillation": 1, "features": 0.7, "classifier": 0.3}
    factors |= {"contrast": 0.2, "consistency": 0.4}
    total = sum(factors[name] * value for name, value in slow.items())
    torch.testing.assert_close(loss.total, total, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.teacher.logits, wanted)
    torch.testing.assert_close(loss.student.logits, logits["clean"])


def test_gradient_flows_to_student_projection_classifier_and_head_alone(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    batch = Batch(images().requires_grad_(), extra={"perturbed": images(seed=4)})
    with method.alignment:
        method.imitation(tiny_student, batch).total.backward()
        for name, weight in [*tiny_student.named_parameters(), *method.head.named_parameters()]:
            assert weight.grad is not None and weight.grad.any(), name
    assert all(weight.grad is None for weight in tiny_teacher.parameters())


def test_a_tied_classifier_is_the_teachers_to_the_end(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, tie_classifier=True)
    steps, _ = run(method)
    assert all(step.loss.terms["classifier"].item() == 0 for step in steps)
    aligned = method.alignment._aligned
    assert torch.equal(aligned.classifier.weight, tiny_teacher[5].weight)
    folded = tiny_teacher[5].weight @ aligned.projection.weight
    torch.testing.assert_close(tiny_student[5].weight, folded)
    assert torch.equal(tiny_student[5].bias, tiny_teacher[5].bias)


def test_a_batch_with_inputs_alone_has_the_terms_of_the_first_two_parts(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student.eval())
    known = method.answered(images())
    bare, _ = loss_of(method, Batch(images()))
    full, _ = loss_of(method, known)
    assert set(bare.terms) == {"distillation", "features", "classifier"}
    assert torch.equal(bare.total, full.total)
    # What is there is not asked again.
    asked = method.teacher.queries
    loss_of(method, known)
    assert method.teacher.queries == asked


def test_pairs_of_one_class_are_spared_by_the_contrast(tiny_teacher, tiny_student):
    apart = make(tiny_teacher, copy.deepcopy(tiny_student).eval())
    spared = make(tiny_teacher, copy.deepcopy(tiny_student).eval(), false_negatives=1e-6)
    batch = Batch(images(), extra={"perturbed": images(seed=4)})
    assert loss_of(apart, batch)[0].terms["contrast"] > 0.1
    # Every pair counts as one of the same class, so nothing is left to be told apart.
    assert loss_of(spared, batch)[0].terms["contrast"].item() == pytest.approx(0, abs=1e-6)


# Selection


def test_only_what_stays_is_trained_on_and_mixed(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, iterations=20)
    passes: list[tuple[int, bool]] = []
    tiny_student.register_forward_hook(
        lambda net, args, out: passes.append((len(args[0]), net.training))
    )
    steps, ctx = run(method)
    counts = [len(batch) for batch in ctx.batches]
    assert min(counts) < ROWS
    assert [rows for rows, training in passes if training] == [2 * count for count in counts]
    # In the first round the teacher alone decides.
    assert [rows for rows, training in passes if not training] == [ROWS] * 40
    for batch, step in zip(ctx.batches, steps, strict=True):
        assert len(batch.extra["perturbed"]) == len(batch.extra["features"]) == len(batch)
        assert batch.weights is not None
        assert batch.weights.mean().item() == pytest.approx(1, rel=1e-6)
        assert torch.equal(step.loss.inputs, batch.inputs)
    record = method.selections()["foreign"]
    assert record.seen.sum() == 60 * ROWS
    assert record.kept.sum() == sum(counts)
    assert method.parts()["looks"] is record


def test_the_teachers_share_falls_from_round_to_round(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, rounds=4, iterations=1)
    shares = []
    for _ in method.run(Recorder()):
        shares.append(method.selector.teacher_share)
    assert shares == [1.0, 0.875, 0.75, 0.625]


def test_an_epoch_trains_on_the_best_of_what_it_looked_at(tiny_teacher, tiny_student):
    method = make(
        tiny_teacher, tiny_student, rounds=1, selection="epoch", candidates=3, keep_share=0.25
    )
    _, ctx = run(method)
    record = method.selections()["foreign"]
    # 9 batches of 8 looks at 40 images: each once or twice.
    assert set(record.seen.tolist()) == {1, 2}
    assert record.kept.sum() < 0.35 * 72
    rows = heap().rows(torch.arange(40))
    probs, classes = F.softmax(tiny_teacher(rows), 1).max(1)
    taken = record.kept > 0
    for label in range(3):
        inside, outside = probs[taken & (classes == label)], probs[~taken & (classes == label)]
        if len(inside) and len(outside):
            assert inside.min() >= outside.max() - 1e-6
    assert [len(batch) for batch in ctx.batches] == [ROWS] * 3


def test_off_takes_all_and_notes_it(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, selection="off")
    _, ctx = run(method)
    record = method.selections()["foreign"]
    assert torch.equal(record.seen, record.kept)
    assert record.seen.sum() == 9 * ROWS
    assert all(batch.weights is None for batch in ctx.batches)


# The student that is handed back


@pytest.mark.parametrize("settings", [{}, {"tie_classifier": True}, {"selection": "epoch"}])
def test_the_user_gets_the_very_network_back_with_the_answers_it_had(
    settings, tiny_teacher, tiny_student
):
    own, keys, inputs = tiny_student[5], list(tiny_student.state_dict()), images(30)
    during: list[Tensor] = []

    def judge(student: nn.Module) -> dict[str, float]:
        assert student is tiny_student
        assert isinstance(student[5], AlignedClassifier)
        with torch.no_grad():
            student.eval()
            during.append(student(inputs))
        return {"accuracy": 0.0}

    outcome = train(make(tiny_teacher, tiny_student, **settings), evaluate=judge)
    assert outcome.network is tiny_student
    assert tiny_student[5] is own
    assert list(tiny_student.state_dict()) == keys
    assert tiny_student[5].weight.shape == (3, 12)
    torch.testing.assert_close(tiny_student(inputs), during[-1], rtol=0, atol=1e-5)
    assert not torch.equal(during[0], during[-1])


def test_an_interrupted_run_hands_the_network_back_as_well(tiny_teacher, tiny_student):
    own = tiny_student[5]
    steps = make(tiny_teacher, tiny_student).run(Recorder())
    next(steps)
    assert tiny_student[5] is not own
    steps.close()
    assert tiny_student[5] is own


def test_students_of_other_forms_work_or_are_told_what_to_do(tiny_teacher):
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False))
    run(make(tiny_teacher, bare))
    assert bare[1].bias is None
    pointwise = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten())  # fmt: skip
    with pytest.raises(TeacherError, match=r"got layer '1' of a Sequential.*expected a linear"):
        make(tiny_teacher, copy.deepcopy(pointwise))
    steps, _ = run(make(tiny_teacher, pointwise, feature_weight=0, classifier_weight=0))
    assert math.isfinite(steps[-1].loss.terms["contrast"].item())
    with pytest.raises(TeacherError, match="as student_layer, or set feature_weight: 0"):
        make(tiny_teacher, nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.LogSoftmax(1)))


def test_named_layers_are_taken(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, teacher_layer="5", student_layer="5")
    assert method.below.names == ("module.5",)
    with pytest.raises(TeacherError, match="got layer '3'"):
        make(tiny_teacher, tiny_student, student_layer="3")


# Together with others


@pytest.mark.parametrize("joint", ["acquire", "concat"])
@pytest.mark.parametrize("meta", ["full", "first-order"])
def test_it_retains_what_it_saw(joint, meta, tiny_teacher, tiny_student):
    retain = Retain(RetainConfig(joint=joint, meta=meta, inner_lr=0.1, least_rows=2, pushes=9))
    steps, _ = run(make(tiny_teacher, tiny_student), retain=retain)
    retained = [step.loss.terms["retention"] for step in steps if "retention" in step.loss.terms]
    assert len(retained) > 3
    assert all(torch.isfinite(term) for term in retained)
    # Remembered rows have no other view, and neither have rows beside them.
    later = {name for step in steps[4:] for name in step.loss.terms}
    assert ("contrast" in later) == (joint == "acquire")


def test_weights_of_a_plug_in_multiply_onto_those_of_the_selection(tiny_teacher, tiny_student):
    class Double:
        def student_batch(self, batch: Batch) -> Batch:
            self.before = batch.weights
            found = batch.weighted(torch.full((len(batch),), 2.0))
            torch.testing.assert_close(found.weights, 2 * self.before)
            return found

        def setup(self, *given: Any) -> None: ...

    both = [copy.deepcopy(tiny_student) for _ in range(2)]
    settings = {"student_weight_decay": 0.0, "rounds": 1, "iterations": 1}
    single, _ = run(make(tiny_teacher, both[0], **settings))
    double, _ = run(make(tiny_teacher, both[1], **settings), double=Double())
    for name, term in single[0].loss.terms.items():
        torch.testing.assert_close(double[0].loss.terms[name], 2 * term)


# What is refused or told


def test_images_must_have_numbers(tiny_teacher, tiny_student):
    with pytest.raises(RecipeError, match="whose rows have no numbers"):
        make(tiny_teacher, tiny_student, NoiseSource(SPEC))


def test_a_small_heap_is_told(tiny_teacher, tiny_student, caplog):
    make(tiny_teacher, tiny_student, heap(5))
    assert "batch_size is 8 and 'heap' holds 5 rows" in caplog.text


def test_two_ways_to_crop_are_refused():
    with pytest.raises(ValueError, match=r"got least_area 0.5 and crop_padding 4, which both crop"):
        KD3Config(least_area=0.5)
    KD3Config(least_area=0.5, crop_padding=0)


def test_mixing_needs_images():
    task = Classification(InputSpec("embedding", (5,)), 3)
    source = TensorSource(torch.randn(9, 5), origin="foreign", name="rows")

    def build(**settings: Any) -> KD3:
        cfg = KD3Config(**{**SMALL, **settings})
        teacher = WhiteBoxTeacher(nn.Linear(5, 3))
        student = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
        return KD3(cfg, task, [teacher], student, {"foreign": source})

    with pytest.raises(RecipeError, match=r"expected images \(C, H, W\) whose channel statistics"):
        build()
    steps, _ = run(build(contrastive_weight=0, consistency_weight=0))
    assert all(torch.isfinite(step.loss.total) for step in steps)


def test_it_learns_what_the_teacher_knows(tiny_teacher, tiny_student):
    inputs = images(200)

    def agreement() -> float:
        same = tiny_student.eval()(inputs).argmax(1) == tiny_teacher(inputs).argmax(1)
        return same.double().mean().item()

    before = agreement()
    settings = {"rounds": 5, "iterations": 30, "batch_size": 32, "student_lr": 0.05}
    train(make(tiny_teacher, tiny_student, heap(400), crop_padding=0, **settings))
    # Measured 0.9; of 3 classes chance is a third.
    assert agreement() > max(0.6, before)
