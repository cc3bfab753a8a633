import torch

from vestige.federated.class_logits import ClassLogits, sums_by_class


def test_sums_by_class_are_a_loop():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([2, 0, 2, 2, 0])
    slow = torch.zeros(3, 3)
    for row, label in enumerate(labels.tolist()):
        slow[label] += logits[row].detach()
    found = sums_by_class(logits, labels)
    torch.testing.assert_close(found, slow)
    assert not found.requires_grad


def test_a_class_is_averaged_over_the_clients_that_have_it():
    answers = ClassLogits(3)
    means = torch.arange(18.0).view(2, 3, 3)
    answers.add(means, torch.tensor([[1, 5, 0], [0, 1, 0]]))
    # Class 0 is one client's, class 1 both clients' whatever their counts, class 2 nobody's.
    torch.testing.assert_close(answers.means[0], means[0, 0])
    torch.testing.assert_close(answers.means[1], means[:, 1].mean(0))
    assert not answers.means[2].any()
    arrays, settings = answers.message()
    assert settings == {"labels": [0, 1]}
    assert torch.equal(arrays["class-logits"]["means"], answers.means)


def test_over_all_clients_one_without_a_class_counts_0():
    answers = ClassLogits(3, over_all=True)
    means = torch.arange(18.0).view(2, 3, 3)
    answers.add(means, torch.tensor([[1, 5, 0], [0, 1, 0]]))
    torch.testing.assert_close(answers.means[0], means[0, 0] / 2)
    torch.testing.assert_close(answers.means[1], means[:, 1].mean(0))
    assert answers.message()[1] == {"labels": [0, 1]}


def test_a_class_that_nobody_drew_keeps_its_mean():
    answers = ClassLogits(2)
    answers.add(torch.ones(1, 2, 2), torch.tensor([[1, 1]]))
    answers.add(torch.full((1, 2, 2), 3.0), torch.tensor([[0, 4]]))
    assert answers.means.tolist() == [[1, 1], [3, 3]]
    other = ClassLogits(2)
    assert other.message() == ({}, {})
    other.load_state_dict(answers.state_dict())
    assert torch.equal(other.means, answers.means) and other.known.all()


def test_what_a_client_without_a_class_sends_for_it_is_not_read():
    answers = ClassLogits(2)
    means = torch.ones(2, 2, 2)
    means[1, 0] = torch.nan
    answers.add(means, torch.tensor([[1, 1], [0, 1]]))
    assert answers.means.tolist() == [[1, 1], [1, 1]]
