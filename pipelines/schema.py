"""The columns at each hand-over between stages."""

from enum import StrEnum

import pyarrow as pa


class Reason(StrEnum):
    """Why a teacher's text was rejected."""

    ENGINE_ERROR = "engine_error"
    TRUNCATED = "truncated"
    UNPARSABLE = "unparsable"
    LABEL_NOT_IN_SET = "label_not_in_set"
    DISAGREES_WITH_GOLD = "disagrees_with_gold"
    OUTVOTED = "outvoted"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    ANSWER_LEAK = "answer_leak"
    DUPLICATE = "duplicate"
    INPUT_TOO_LONG = "input_too_long"


SPLITS: tuple[str, ...] = ("train", "validation", "test", "unlabelled")

# examples/<key>/examples.parquet: every row of the source once, with the text that models read.
EXAMPLES = pa.schema(
    [
        ("row_id", pa.string()),
        ("split", pa.string()),
        ("position", pa.int64()),  # the row's place in its source, from 0; only the reference layout joins by it
        ("input", pa.string()),
        ("choices", pa.list_(pa.string())),  # of kind row_choice; else null
        ("label", pa.string()),  # gold; null where unlabelled
    ]
)

# generations/<key>/: what the teacher wrote, as it came. Paid for once.
GENERATIONS = pa.schema(
    [
        ("row_id", pa.string()),
        ("split", pa.string()),
        ("sample", pa.int32()),
        ("teacher", pa.string()),
        ("prompt_hash", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),  # stop, length, error, too_long (the prompt), or outputs (the text was given)
        ("error", pa.string()),  # the engine's error, else null
        ("input_tokens", pa.int32()),  # null where unknown
        ("cached_tokens", pa.int32()),  # of the input, found in the engine's prefix cache; null where unknown
        ("output_tokens", pa.int32()),
    ]
)

# rationales/<key>/accepted.parquet and rejected.parquet
RATIONALES = pa.schema(
    [
        *GENERATIONS,
        ("rationale", pa.string()),
        ("label", pa.string()),  # the teacher's; null where it could not be read
        ("agreement", pa.float32()),  # share of the row's readable samples that say this label; null without a label
        ("rationalized", pa.bool_()),  # written with the gold label told
    ]
)
REJECTED = pa.schema([*RATIONALES, ("reason", pa.string()), ("detail", pa.string())])

# dataset/<key>/{train,validation,test}.parquet: one row an example. In train it stands with what the
# teachers said of it; elsewhere that list is empty.
DATASET = pa.schema(
    [
        ("row_id", pa.string()),
        ("input", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("label", pa.string()),  # gold; null where unlabelled
        ("teacher_label", pa.string()),  # what the teacher answered, never filtered by gold; null if nothing readable
        (
            "rationales",
            pa.list_(
                pa.struct(
                    [
                        ("teacher", pa.string()),
                        ("sample", pa.int32()),
                        ("rationale", pa.string()),
                        ("label", pa.string()),
                        ("agreement", pa.float32()),
                        ("rationalized", pa.bool_()),
                        ("reason", pa.string()),  # why it was rejected; null when accepted
                    ]
                )
            ),
        ),
    ]
)

# train/<key>/losses.parquet: one row a step
LOSSES = pa.schema(
    [
        ("step", pa.int64()),  # from 1
        ("loss", pa.float64()),
        ("label_loss", pa.float64()),  # null where the step had one task alone
        ("rationale_loss", pa.float64()),
    ]
)

# search/<key>/trials.parquet
TRIALS = pa.schema(
    [
        ("name", pa.string()),
        ("arm", pa.string()),
        ("labels", pa.string()),
        ("fraction", pa.float64()),
        ("alpha", pa.float64()),  # null: student.alpha
        ("model", pa.string()),  # null: student.model
        ("teacher", pa.string()),  # null: all
        ("seed", pa.int64()),
        ("key", pa.string()),  # of the student's artefact
        ("state", pa.string()),  # done, stopped (early), failed, or not reached
        ("error", pa.string()),
        ("step", pa.int64()),  # the last that was looked at
        ("score", pa.float64()),  # the best on validation so far, by student.metric
        ("seconds", pa.float64()),  # since the trial began, where it was stopped
        ("tokens_read", pa.int64()),  # until then; null where it was not
        ("tokens_written", pa.int64()),
        ("chosen", pa.bool_()),
    ]
)

# evaluate/<key>/predictions.parquet
PREDICTIONS = pa.schema(
    [
        ("row_id", pa.string()),
        ("input", pa.string()),
        ("label", pa.string()),
        ("prediction", pa.string()),  # null when what was decoded is no answer of the task
        ("text", pa.string()),  # what was decoded, or the label that scored best
        ("confidence", pa.float32()),
        ("correct", pa.bool_()),
    ]
)
