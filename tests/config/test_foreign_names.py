"""The names of other trainers are answered with ours."""

from __future__ import annotations

import pytest

from runner.cli.overrides import parse_arguments
from runner.common.errors import ConfigError
from runner.config import schema, serialize
from runner.config.foreign_names import OUR_NAMES, explain_foreign
from runner.config.invocation import INVOCATION_ARGUMENTS


def test_every_answer_is_a_name_that_there_is():
    known = {*serialize.default_settings(), *schema.section_metadata(), *schema.GROUPS, *INVOCATION_ARGUMENTS}
    assert {name for names in OUR_NAMES.values() for name in names} <= {*known, "hydra.run.dir"}


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("lora.target_modules=[q_proj]", "here it is lora.keys"),
        ("r=8", "here it is lora.rank"),
        ("train.learning_rate=1", "here it is optimizer.learning_rate"),
        ("per_device_train_batch_size=2", "here it is train.batch_size"),
        ("--max-seq-length", "here it is data.max_length"),
        ("warmup_ratio=0.1", "the ratio times train.iters"),
        ("num_train_epochs=3", "here it is train.epochs"),
        ("use_dora=true", "no setting 'use_dora': here it is lora.type. lora.type=dora."),
        ("sample_packing=true", "Rows are neither packed into one nor padded to a length: docs/data.md"),
        ("train.packing=true", "Rows are neither packed"),
        ("roles_to_train=[assistant]", "Every turn of the assistant is trained on"),
        ("eot_tokens=[x]", "found in the chat template"),
        ("dataset_dir=x", "here it is data.path"),
        ("dataset_num_proc=4", "tokenized on all cores"),
        (
            "train_on_inputs=true",
            "here it is data.mask_prompt. The meaning is reversed: train_on_inputs=true is data.mask_prompt=false",
        ),
        ("save_steps=3", "here it is checkpoint.every"),
    ],
)
def test_a_name_of_another_trainer_is_answered_with_ours(argument, answer):
    with pytest.raises(ConfigError, match=answer):
        parse_arguments([argument])


def test_a_name_that_is_ours_is_not_explained():
    assert all(explain_foreign(name) is None for name in serialize.default_settings())
