"""Callbacks in real trainings: importance equals the oracle's, training is unchanged, refusals."""

import contextlib
import logging
import pickle

import oracles
import pytest
import torch
import torch.utils.data
from torch import nn
from torch.nn import functional

from sampimp import HuggingFaceImportance, LightningImportance
from sampimp.errors import ConfigError, UnsupportedError
from sampimp.training.models import flatten_parameters

SAMPLES, EPOCHS, CLIP = 9, 2, 0.05
GROUPS = {
    1: [[(0, 1)], [(2, 3)], [(4, 5)], [(6, 7)], [(8,)]],
    2: [[(0, 1), (2, 3)], [(4, 5), (6, 7)], [(8,)]],
}
"""The batches of each update of an epoch, by the number of batches that are accumulated."""

pytestmark = [
    # These warnings are about code of the libraries themselves.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread_in_float64():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(before)


def expected_importance(model, accumulated, losses_of):
    """Train in a plain loop; return the oracle's beta, of shape (epoch, layer, sample)."""
    optimizer = make_optimizer(model)
    layers = {oracles.layer_of(name) for name, _ in model.named_parameters()}
    table = torch.full((EPOCHS, len(layers), SAMPLES), torch.nan)
    for epoch in range(EPOCHS):
        for group in GROUPS[accumulated]:
            optimizer.zero_grad()
            losses = losses_of(model, group)
            gradients = oracles.gradients_by_loss(model, losses)
            losses.sum().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            factor = min(1.0, CLIP / (float(norm) + 1e-6))
            scaled = {name: factor * gradient for name, gradient in gradients.items()}
            betas = oracles.importance_by_update(model, optimizer, scaled)
            optimizer.step()
            rows = [sample for batch in group for sample in batch]
            table[epoch][:, rows] = torch.stack(list(betas.values()))
    assert (table > 0).any(2).all()
    return table


def make_optimizer(model):
    # Adam's first step is almost the gradient's sign, which has no derivative; with an eps of this
    # size it has importance that can be compared.
    return torch.optim.AdamW(model.parameters(), lr=0.05, eps=0.01, weight_decay=0.1)


def recorded_importance(recorder):
    """Return beta (epoch, layer, sample), with the layers in the order of registration."""
    places = [recorder.layers.index(name) for name in recorder._capture.layers]
    return torch.stack([recorder.pop_epoch(e, SAMPLES)[places] for e in range(1, EPOCHS + 1)])


def is_watched():
    return torch.overrides._get_current_function_mode_stack() != []


def ended(way):
    if way == "exception":
        return pytest.raises(RuntimeError, match="in the middle of a step")
    return contextlib.nullcontext()


# PyTorch Lightning.


@pytest.fixture(scope="module")
def pl():
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pl


@pytest.fixture(scope="module")
def lightning_model(pl):
    """Return the class of a small network; `hook` is called in each training step."""

    class Small(pl.LightningModule):
        def __init__(self, hook=lambda self: None, automatic=True):
            super().__init__()
            self.net, self.hook = oracles.tiny_mlp(activation=nn.Tanh), hook
            self.automatic_optimization = automatic

        def training_step(self, batch, batch_idx):
            self.hook(self)
            inputs, labels, *_ = batch.values() if isinstance(batch, dict) else batch
            return functional.cross_entropy(self.net(inputs), labels)

        def validation_step(self, batch, batch_idx):
            self.log("loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            return make_optimizer(self)

    return Small


def lightning_data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 4, generator=generator)
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
    return torch.utils.data.TensorDataset(inputs, labels, torch.arange(SAMPLES))


def fit(pl, model, *callbacks, as_dict=False, validate=False, **options):
    """Train on the samples in the order of their indices."""

    def collate(rows):
        # A new tensor per batch, as data sets make it; the next batch is made while a step that
        # accumulates is still open.
        rows = [[torch.tensor(part.tolist()) for part in row] for row in rows]
        values = torch.utils.data.default_collate(rows)
        return dict(zip(("inputs", "labels", "index"), values, strict=True)) if as_dict else values

    loader = torch.utils.data.DataLoader(lightning_data(), batch_size=2, collate_fn=collate)
    defaults = {"max_epochs": EPOCHS, "gradient_clip_val": CLIP, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **defaults | options,
    )
    trainer.fit(model, loader, loader if validate else None)
    return trainer


@pytest.mark.parametrize("accumulated", GROUPS)
def test_lightning_is_recorded_as_it_trains(pl, lightning_model, accumulated):
    inputs, labels, _ = lightning_data().tensors

    def losses_of(model, group):
        # The mean over a batch, divided by the number of accumulated batches.
        return torch.cat(
            [
                functional.cross_entropy(
                    model.net(inputs[[*rows]]), labels[[*rows]], reduction="none"
                )
                / (len(rows) * accumulated)
                for rows in group
            ]
        )

    expected = expected_importance(lightning_model(), accumulated, losses_of)
    importance, model, plain = LightningImportance(), lightning_model(), lightning_model()
    # Validation runs after every second batch, so also between two accumulated batches.
    options = {"accumulate_grad_batches": accumulated, "val_check_interval": 1, "validate": True}
    fit(pl, model, importance, as_dict=True, **options)
    fit(pl, plain, **options)
    assert torch.equal(flatten_parameters(model), flatten_parameters(plain))
    assert importance.recorder.layers == ("net.0", "net.2")
    assert oracles.close(recorded_importance(importance.recorder), expected, 1e-9)
    assert not is_watched()


def test_lightning_takes_the_index_from_a_position_or_by_a_function(pl, lightning_model):
    datasets = []
    for index in (2, lambda batch: batch[-1]):
        importance = LightningImportance(index, loss_reduction="sum")
        fit(pl, lightning_model(), importance)
        datasets.append(importance.recorder.to_dataset())
        assert datasets[-1]["importance"].attrs["loss_reduction"] == "sum"
        assert datasets[-1]["epoch"].values.tolist() == [1, 2]
    assert datasets[0].identical(datasets[1])


def test_lightning_reports_each_epoch_at_its_end(pl, lightning_model):
    reported = {}
    importance = LightningImportance(2, on_epoch=lambda epoch, data: reported.update({epoch: data}))
    fit(pl, lightning_model(), importance)
    check_reports(reported, importance.recorder)


def check_reports(reported, recorder):
    assert list(reported) == [1, 2]
    whole = recorder.to_dataset()["importance"]
    for epoch, dataset in reported.items():
        assert dataset["importance"].equals(whole.sel(epoch=epoch))
        assert float(dataset["coverage"]) == 1


def test_lightning_without_an_index_is_refused(pl, lightning_model):
    with pytest.raises(ConfigError, match=r"batch\['index'\](.|\n)*list without(.|\n)*index=2"):
        fit(pl, lightning_model(), LightningImportance())
    assert not is_watched()


def test_lightning_that_does_not_step_by_itself_is_refused(pl, lightning_model):
    with pytest.raises(UnsupportedError, match="manual"):
        fit(pl, lightning_model(automatic=False), LightningImportance(2), gradient_clip_val=None)


def test_lightning_with_a_compiled_model_is_refused(pl, lightning_model):
    with pytest.raises(UnsupportedError, match="without compilation"):
        fit(pl, torch.compile(lightning_model()), LightningImportance(2))


def test_the_lightning_callback_can_be_pickled():
    importance = pickle.loads(pickle.dumps(LightningImportance("sample", batch_dim=1)))
    assert (importance._index, importance._options) == ("sample", {"batch_dim": 1})


def test_lightning_of_several_processes_is_refused(pl, lightning_model, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(UnsupportedError, match=r"one process(.|\n)*Got 2"):
        fit(pl, lightning_model(), LightningImportance(2))


@pytest.mark.parametrize("way", ["exception", "stop", "skipped epoch"])
def test_lightning_leaves_an_unfinished_step_out(pl, lightning_model, monkeypatch, way):
    """Stop at the fourth batch, the second of two accumulated ones, before its update."""
    calls = []

    def hook(model):
        calls.append(is_watched())
        if len(calls) == 3:
            if way == "exception":
                raise RuntimeError("in the middle of a step")
            if way == "stop":
                model.trainer.should_stop = True

    importance, model = LightningImportance(2), lightning_model(hook)
    if way == "skipped epoch":
        monkeypatch.setattr(
            type(model),
            "on_train_batch_start",
            lambda self, batch, batch_idx: -1 if len(calls) == batch_idx == 3 else None,
        )
    with ended(way):
        fit(pl, model, importance, accumulate_grad_batches=2, max_epochs=1)
    assert calls == [True] * 3
    assert not is_watched()
    beta = importance.recorder.pop_epoch(1, SAMPLES)
    assert beta.isnan().all(0).nonzero().flatten().tolist() == [4, 5, 6, 7, 8]
    fit(pl, model, importance)  # the next training is recorded completely
    assert importance.recorder.pop_epoch(2, SAMPLES).isfinite().all()


# Hugging Face.


@pytest.fixture(scope="module")
def hf():
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


@pytest.fixture
def train(hf, tmp_path):
    """Return a function that trains on sentences of different lengths, recorded or not."""

    def run(
        model,
        *,
        record,
        with_index=True,
        inside=lambda trainer: None,
        compute_loss_func=None,
        on_epoch=None,
        **options,
    ):
        words = sentences()
        column = torch.arange(SAMPLES).tolist()
        rows = [
            {"input_ids": ids, "labels": labels} | ({"index": i} if with_index else {})
            for i, ids, labels in zip(column, *words, strict=True)
        ]
        defaults = {
            "per_device_train_batch_size": 2,
            "num_train_epochs": EPOCHS,
            "learning_rate": 0.05,
            "adam_epsilon": 0.01,
            "weight_decay": 0.1,
            "max_grad_norm": CLIP,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": not record,
            "eval_strategy": "epoch",
        }
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            **defaults | options,
        )
        trainer = hf.Trainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows[:4],
            compute_loss_func=compute_loss_func,
        )
        # Weight decay acts on all parameters, as in the plain loop.
        trainer.get_decay_parameter_names = lambda model: [n for n, _ in model.named_parameters()]
        if not record:
            trainer.train()
            return None
        with HuggingFaceImportance(trainer, on_epoch=on_epoch) as importance:
            inside(trainer)
            trainer.train()
        return importance.recorder

    return run


def sentences():
    """Return token ids (sample, 6), and labels, which are -100 for the padding."""
    ids = torch.randint(0, 11, (SAMPLES, 6), generator=torch.Generator().manual_seed(2))
    lengths = torch.arange(SAMPLES) % 4 + 3
    return ids, ids.where(torch.arange(6) < lengths[:, None], -100)


@pytest.fixture(scope="module")
def gpt(hf):
    """Return a function that builds a very small GPT-2."""

    def build():
        torch.manual_seed(0)
        config = hf.GPT2Config(
            vocab_size=11, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config)

    return build


def token_losses(logits, labels):
    """Return the loss of each token, (sample, token); 0 where the label is -100."""
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def mean_loss(outputs, labels, num_items_in_batch):
    return token_losses(outputs.logits, labels).sum() / num_items_in_batch


@pytest.mark.parametrize(
    ("accumulated", "loss", "first", "tolerance"),
    # The model's loss is in float32, and divided by the number of predicted tokens; a loss function
    # of the user receives the number of all tokens.
    [(1, mean_loss, 0, 1e-9), (2, mean_loss, 0, 1e-9), (2, None, 1, 1e-4)],
)
def test_hugging_face_is_recorded_as_it_trains(train, gpt, accumulated, loss, first, tolerance):
    ids, labels = sentences()

    def losses_of(model, group):
        rows = [sample for batch in group for sample in batch]
        losses = token_losses(model(input_ids=ids[rows]).logits, labels[rows])
        return losses.sum(1) / (labels[rows][:, first:] != -100).sum()

    expected = expected_importance(gpt(), accumulated, losses_of)
    model, plain = gpt(), gpt()
    options = {"gradient_accumulation_steps": accumulated, "compute_loss_func": loss}
    recorder = train(model, record=True, **options)
    train(plain, record=False, **options)
    assert torch.equal(flatten_parameters(model), flatten_parameters(plain))
    assert recorder.optimizer.defaults["fused"]  # Trainer's default
    assert oracles.close(recorded_importance(recorder), expected, tolerance)
    assert not model._forward_pre_hooks
    assert not is_watched()


def test_hugging_face_reports_each_epoch_at_its_end(train, gpt):
    reported = {}
    recorder = train(gpt(), record=True, on_epoch=lambda epoch, d: reported.update({epoch: d}))
    check_reports(reported, recorder)


def test_hugging_face_without_an_index_is_refused(train, gpt):
    for options in ({"with_index": False}, {"remove_unused_columns": True}):
        with pytest.raises(ConfigError, match=r"of input_ids, labels(.|\n)*remove_unused_columns"):
            train(gpt(), record=True, **options)
    assert not is_watched()


def test_hugging_face_on_several_devices_is_refused(train, gpt, monkeypatch):
    def wrap(trainer):
        monkeypatch.setattr(trainer, "_wrap_model", nn.DataParallel)

    with pytest.raises(UnsupportedError, match="DataParallel around GPT2LMHeadModel"):
        train(gpt(), record=True, inside=wrap)


@pytest.mark.parametrize("way", ["exception", "stop"])
def test_hugging_face_leaves_an_unfinished_step_out(hf, train, gpt, way):
    """Stop in the second update, after the first of its two batches."""
    model, calls, recorders = gpt(), [], []

    class Stop(hf.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            calls.append(is_watched())
            if len(calls) == 2:
                if way == "exception":
                    raise RuntimeError("in the middle of a step")
                control.should_training_stop = True

    def inside(trainer):
        trainer.add_callback(Stop())
        recorders.append(trainer.callback_handler.callbacks[-2])

    options = {"gradient_accumulation_steps": 2, "eval_strategy": "no"}
    with ended(way):
        train(model, record=True, inside=inside, **options)
    assert calls == [True, True]
    assert not is_watched()
    assert not model._forward_pre_hooks
    beta = recorders[0].recorder.pop_epoch(1, SAMPLES)
    assert beta.isnan().all(0).nonzero().flatten().tolist() == [4, 5, 6, 7, 8]
