"""Nine skeletons of what later systems do, on the real Context with fake teachers.

None of them learns anything worth having; each has the loops, optimizers, roles, state and plug-ins
of its kind. `docs/architecture.md` explains the form with them.
"""

import torch
from pydantic import BaseModel
from torch import nn
from torch.nn import functional as F

from vestige.core.functional import functional
from vestige.core.types import Access, Batch, InputSpec, Loss, Requires, Result, predict
from vestige.errors import QueryBudgetExceeded
from vestige.losses.distill import kl_divergence, l1_logits
from vestige.sources.memory import RingMemory
from vestige.sources.pool import Pool
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.teachers.white_box import WhiteBoxTeacher

WIDTH, CLASSES, BATCH = 6, 3, 8


class Settings(BaseModel):
    """No settings."""


class FakeTask:
    """A task whose inputs are vectors."""

    kind, metric, num_classes = "classification", "accuracy", CLASSES
    spec = InputSpec("vector", (WIDTH,))


def make_student():
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
    )


def make_teacher():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def make_generator():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, WIDTH))


def sgd(lr=0.05):
    return lambda params: torch.optim.SGD(params, lr, momentum=0.9)


def adam(lr=0.01):
    return lambda params: torch.optim.Adam(params, lr)


class Skeleton:
    """What all nine share: building, parts and result; each tells its own `run`."""

    Config = Settings
    requires = Requires()

    def __init__(self, teachers, student):
        self.teacher, self.teachers, self.student = teachers[0], teachers, student
        self.held = {"student": student}
        self.build()

    def build(self):
        """Add parts to `self.held`."""

    def parts(self):
        return self.held

    def result(self):
        return Result("student", self.student)

    def passes(self, cfg):
        return {}

    def distill(self, student, batch):
        with torch.no_grad():
            teacher = predict(self.teacher, batch.inputs)
        answer = predict(student, batch.inputs)
        loss = batch.mean(l1_logits(answer.logits, teacher.logits))
        return Loss({"distance": loss}, loss, batch.inputs, teacher, answer)


class AdversarialPair(Skeleton):
    """(a) A generator looks for disagreement, the student follows; a warm-up loop before."""

    def build(self):
        self.generator = self.held["generator"] = make_generator()

    def disagree(self, generator, batch):
        inputs = generator(batch.latent)
        teacher, answer = predict(self.teacher, inputs), predict(self.student, inputs)
        loss = -batch.mean(l1_logits(answer.logits, teacher.logits))
        return Loss({"adversarial": loss}, loss, inputs, teacher, answer)

    def run(self, ctx):
        student = ctx.optimizer("student", self.student.parameters(), sgd())
        generator = ctx.optimizer("generator", self.generator.parameters(), adam())
        for loop, source_steps in (("warm-up", 0), ("distill", 1)):
            for _ in ctx.rounds(loop, 3):
                for _ in range(2):
                    with torch.no_grad():
                        fakes = self.generator(torch.randn(BATCH, 4, generator=ctx.rng))
                    yield ctx.update("student", self.student, self.distill, Batch(fakes), student)
                for _ in range(source_steps):
                    batch = Batch(latent=torch.randn(BATCH, 4, generator=ctx.rng))
                    yield ctx.update("source", self.generator, self.disagree, batch, generator)


class Inversion(Skeleton):
    """(b) Invert batch by batch with a fresh optimizer into a pool, then distill from the pool."""

    def build(self):
        self.pool = self.held["pool"] = Pool()

    def run(self, ctx):
        for _ in ctx.rounds("invert", 3):
            labels = torch.randint(CLASSES, (BATCH,), generator=ctx.rng)
            images = nn.Parameter(torch.randn(BATCH, WIDTH, generator=ctx.rng))
            optimizer = ctx.optimizer("images", [images], adam(0.1), fresh=True)
            best, lowest = images.detach().clone(), torch.tensor(float("inf"))
            for _ in range(3):
                before = images.detach().clone()
                step = ctx.update(
                    "source", self.teacher, self.invert, Batch(images, labels), optimizer
                )
                best = torch.where(step.loss.total < lowest, before, best)
                lowest = torch.minimum(lowest, step.loss.total)
                yield step
            self.pool.add(best, labels)
        student = ctx.optimizer("student", self.student.parameters(), sgd())
        for _ in ctx.rounds("distill", 3):
            batch = Batch(self.pool.draw(BATCH, ctx.rng))
            yield ctx.update("student", self.student, self.distill, batch, student)

    def invert(self, teacher, batch):
        loss = F.cross_entropy(predict(teacher, batch.inputs).logits, batch.labels)
        return Loss({"one_hot": loss}, loss, batch.inputs)


class FourPlayers(Skeleton):
    """(c) Generator, discriminator, student and teacher; the discriminator is auxiliary."""

    def build(self):
        self.generator = self.held["generator"] = make_generator()
        self.discriminator = self.held["discriminator"] = nn.Linear(WIDTH, 1)

    def run(self, ctx):
        judge = ctx.optimizer("discriminator", self.discriminator.parameters(), adam())
        maker = ctx.optimizer("generator", self.generator.parameters(), adam())
        student = ctx.optimizer("student", self.student.parameters(), sgd())
        for loop, everyone in (("meet", False), ("play", True)):
            for _ in ctx.rounds(loop, 3):
                fakes = self.generator(torch.randn(BATCH, 4, generator=ctx.rng))
                foreign = torch.randn(BATCH, WIDTH, generator=ctx.rng)
                batch = Batch(fakes.detach(), extra={"foreign": foreign})
                yield ctx.update("auxiliary", self.discriminator, self.judge, batch, judge)
                if everyone:
                    # The same fakes with their graph: the generator runs forward once for both.
                    yield ctx.update("source", self.generator, self.fool, Batch(fakes), maker)
                    batch = Batch(torch.cat([fakes.detach(), foreign]))
                    yield ctx.update("student", self.student, self.distill, batch, student)

    def judge(self, discriminator, batch):
        fake, foreign = discriminator(batch.inputs), discriminator(batch.extra["foreign"])
        loss = F.softplus(fake).mean() + F.softplus(-foreign).mean()
        return Loss({"judge": loss}, loss)

    def fool(self, generator, batch):
        teacher, answer = predict(self.teacher, batch.inputs), predict(self.student, batch.inputs)
        local = F.softplus(-self.discriminator(batch.inputs)).mean()
        adversarial = -batch.mean(kl_divergence(answer.logits, teacher.logits))
        terms = {"local": local, "adversarial": adversarial}
        return Loss(terms, local + adversarial, batch.inputs, teacher, answer)


class Bilevel:
    """(d) A plug-in that evaluates the student elsewhere: meta-train on new, meta-test on old."""

    Config, requires = Settings, Requires()

    def __init__(self, cfg):
        self.memory = RingMemory(32)

    def setup(self, task, teachers, student, ctx):
        self.rng = ctx.generator("bilevel")

    def parts(self):
        return {"memory": self.memory}

    def student_gradient(self, update, following):
        loss = following()
        inner = {name: p.grad for name, p in update.params.items()}
        if len(self.memory):
            live = dict(update.params)
            acquired = update.loss_fn(functional(update.model, live), update.batch).total
            slopes = torch.autograd.grad(acquired, list(live.values()), create_graph=True)
            moved = {n: p - 0.1 * g for (n, p), g in zip(live.items(), slopes, strict=True)}
            old = Batch(self.memory.draw(BATCH, self.rng))
            retained = update.loss_fn(functional(update.model, moved), old).total
            outer = torch.autograd.grad(retained, list(live.values()))
            for (name, p), g in zip(live.items(), outer, strict=True):
                p.grad = inner[name] + g
        self.memory.push(update.batch.inputs)
        return loss


class TermAndGradient:
    """(e) A source term, a filter of the student's rows, a gradient and a late optimizer."""

    Config, requires = Settings, Requires()

    def __init__(self, cfg):
        self.trigger = nn.Parameter(torch.zeros(1, WIDTH))
        self.held = nn.ParameterDict({"trigger": self.trigger})

    def setup(self, task, teachers, student, ctx):
        self.ctx, self.teacher = ctx, teachers[0]
        self.late = ctx.optimizer("late", student.parameters(), sgd(0.01))
        self.shuffled = ctx.generator("shuffle")

    def parts(self):
        return {"trigger": self.held}

    def source_terms(self, loss, batch):
        order = torch.randperm(WIDTH, generator=self.shuffled)
        suspicious = predict(self.teacher, loss.inputs[:, order]).logits
        return {"vaccine": -0.1 * l1_logits(suspicious, loss.teacher.logits).mean()}

    def student_batch(self, batch):
        kept = batch.rows(batch.inputs.abs().mean(1) < 5)
        return kept.weighted(1 - 0.1 * (kept.inputs[:, 0] > 1).float())

    def student_gradient(self, update, following):
        loss = following()
        shifted = Batch(update.batch.inputs + 0.1 + self.trigger.detach())
        loss_here = update.loss_fn(functional(update.model, dict(update.params)), shifted).total
        grads = torch.autograd.grad(loss_here, list(update.params.values()))
        for p, g in zip(update.params.values(), grads, strict=True):
            p.grad += 0.5 * g
        with torch.no_grad():
            self.trigger += 0.01 * update.batch.inputs.mean(0)
        return loss

    def student_optimizers(self, given, clip):
        progress = self.ctx.progress
        late = progress.loop == "distill" and progress.position >= 1 / 3
        return ((self.late,), None) if late else (given, clip)


class TermAndGradientOnly(TermAndGradient):
    """(e) where the source is stepped by hand-made gradients, which no plug-in wraps."""

    source_terms = None


class Embeddings(Skeleton):
    """(f) Inputs are embeddings; they climb on a score of the student by hand-made gradients."""

    def build(self):
        self.head = self.held["head"] = nn.Linear(CLASSES, WIDTH)
        self.memory = self.held["memory"] = RingMemory(16)

    def run(self, ctx):
        learner = ctx.optimizer("student", self.student.parameters(), sgd())
        head = ctx.optimizer("head", self.head.parameters(), sgd())
        for _ in ctx.rounds("learn", 3):
            embeddings = nn.Parameter(0.3 * torch.randn(BATCH, WIDTH, generator=ctx.rng))
            climber = ctx.optimizer("embeddings", [embeddings], sgd(0.1), fresh=True)
            for _ in range(2):
                score = self.difficulty(embeddings)
                (slope,) = torch.autograd.grad(score, [embeddings])
                slope = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-8)
                yield ctx.apply("source", {embeddings: -slope}, climber)
            self.memory.push(embeddings)
            batch = Batch(embeddings.detach())
            yield ctx.update("student", self.student, self.learn, batch, learner, head)
        for _ in ctx.rounds("polish", 2):
            batch = Batch(self.memory.draw(BATCH, ctx.rng))
            yield ctx.update("student", self.student, self.distill, batch, learner)

    def difficulty(self, embeddings):
        return (self.head(self.student(embeddings)) - embeddings).square().mean()

    def learn(self, student, batch):
        loss = self.distill(student, batch)
        guess = (self.head(loss.student.logits) - batch.inputs).square().mean(1)
        return loss.plus({"self_supervised": 0.1 * batch.mean(guess)})


class Bootstrap(Skeleton):
    """(g) No generator: the student's own answer, moved by the teacher, is its next target."""

    requires = Requires(tasks=("diffusion",))

    def run(self, ctx):
        optimizer = ctx.optimizer("student", self.student.parameters(), adam())
        for loop, bootstrapped in (("boundary", False), ("bootstrap", True)):
            for _ in ctx.rounds(loop, 3):
                for _ in range(2):
                    noise = torch.randn(BATCH, WIDTH, generator=ctx.rng)
                    with torch.no_grad():
                        target = predict(self.teacher, noise).logits
                        if bootstrapped:
                            # Elsewhere and in eval mode, so live statistics move once an update.
                            self.student.eval()
                            own = functional(self.student, {})(noise)
                            self.student.train()
                            target = own + 0.3 * (target - own)
                    batch = Batch(noise, extra={"target": target})
                    yield ctx.update("student", self.student, self.regress, batch, optimizer)

    def regress(self, student, batch):
        answer = predict(student, batch.inputs)
        error = (answer.logits - batch.extra["target"]).square().mean(1)
        loss = batch.mean(error)
        return Loss({"bootstrap": loss}, loss, batch.inputs, None, answer)


class Clients:
    """Private data and a personal state each; trains a copy and hands back weights."""

    def __init__(self, count):
        self.count, self.drift = count, {str(k): torch.zeros(WIDTH) for k in range(count)}

    def fit(self, index, model, rng):
        inputs = torch.randn(BATCH, WIDTH, generator=rng) + index
        names, weights = zip(*model.named_parameters(), strict=True)
        loss = functional(model, {})(inputs).square().mean()
        grads = torch.autograd.grad(loss, weights)
        self.drift[str(index)] = self.drift[str(index)] + inputs.mean(0)
        return {n: w.detach() - 0.1 * g for n, w, g in zip(names, weights, grads, strict=True)}

    def state_dict(self):
        return self.drift

    def load_state_dict(self, state):
        self.drift = dict(state)


class Federated(Skeleton):
    """(h) Rounds of clients behind an object; the server averages, then distills."""

    def build(self):
        self.clients = self.held["clients"] = Clients(4)
        self.generator = self.held["generator"] = make_generator()

    def run(self, ctx):
        server = ctx.optimizer("student", self.student.parameters(), sgd())
        for loop in ("gather", "fuse"):
            for _ in ctx.rounds(loop, 3):
                chosen = torch.randperm(self.clients.count, generator=ctx.rng)[:2].tolist()
                sent = [self.clients.fit(index, self.student, ctx.rng) for index in chosen]
                # FedAvg as a gradient: the old weights minus the mean of the new ones.
                moves = {
                    p: p.detach() - torch.stack([weights[n] for weights in sent]).mean(0)
                    for n, p in self.student.named_parameters()
                }
                yield ctx.apply("student", moves, server)
                if loop == "fuse":
                    with torch.no_grad():
                        fakes = self.generator(torch.randn(BATCH, 4, generator=ctx.rng))
                    yield ctx.update("student", self.student, self.distill, Batch(fakes), server)


class ManyTeachers(Skeleton):
    """(i) Two white boxes and a black box that stops answering when its budget is spent."""

    requires = Requires(access=Access.SCORES, teachers=(2, 9))

    def build(self):
        self.pool = self.held["pool"] = Pool()

    def run(self, ctx):
        box = self.teachers[-1]
        for _ in ctx.rounds("ask", 4):
            inputs = torch.randn(BATCH, WIDTH, generator=ctx.rng)
            try:
                answers = predict(box, inputs).logits
            except QueryBudgetExceeded:
                break
            self.pool.add(inputs, answers.argmax(1))
        optimizer = ctx.optimizer("student", self.student.parameters(), sgd())
        for _ in ctx.rounds("distill", 3):
            batch = Batch(self.pool.draw(BATCH, ctx.rng))
            yield ctx.update("student", self.student, self.amalgamate, batch, optimizer)

    def amalgamate(self, student, batch):
        with torch.no_grad():
            answers = [predict(teacher, batch.inputs).logits for teacher in self.teachers[:-1]]
        mean = torch.stack(answers).mean(0)
        answer = predict(student, batch.inputs)
        loss = batch.mean(kl_divergence(answer.logits, mean, temperature=4.0))
        return Loss({"amalgamation": loss}, loss, batch.inputs, None, answer)


def white_box():
    return WhiteBoxTeacher(make_teacher())


def black_box(budget):
    return BlackBoxTeacher(make_teacher().eval(), access=Access.SCORES, budget=budget)
