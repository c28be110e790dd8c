"""Laws of labelled batches: every row once with its label, order by the key alone, taken rows are the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.examples import Example, Image, Turn
from fedferret.data.labelled_batches import LabelledImages, LabelledTexts, cut_texts
from fedferret.models.tiny import tiny_tokenizer

CLASSES = ("sport", "politics", "weather")
TOKENIZER = tiny_tokenizer()


def text(content: str, label: str) -> Example:
    return Example((Turn("user", content), Turn("assistant", label)), {"category": label})


def image(pixels: bytes, label: str, shape: tuple[int, int, int] = (1, 2, 3)) -> Example:
    return Example((Turn("assistant", label),), {"category": label}, Image(pixels, shape))


labels = st.sampled_from(CLASSES)
texts = st.lists(
    st.builds(text, st.text("ab é\n", min_size=1, max_size=30).map(lambda end: f"x{end}"), labels), max_size=40
)
images = st.lists(st.builds(image, st.binary(min_size=6, max_size=6), labels), max_size=40)
either = texts.map(lambda rows: LabelledTexts.of(rows, TOKENIZER, 12, CLASSES)) | images.map(
    lambda rows: LabelledImages.of(rows, CLASSES)
)
keys = st.none() | st.integers(0, 2**64 - 1).map(Key)


def rows_of(examples, size=5, key=None):
    """Every row of the batches: its values without padding, and its label."""
    found = []
    for batch in examples.batches(size, key):
        assert 1 <= len(batch) <= size
        for place, label in enumerate(batch.labels.tolist()):
            if isinstance(examples, LabelledImages):
                values = batch.pixels[place].flatten().tolist()
            else:
                mask = batch.attention_mask[place]
                values = batch.input_ids[place][mask.bool()].tolist()
                assert mask.tolist() == [1] * len(values) + [0] * (len(mask) - len(values))
                assert set(batch.input_ids[place][len(values) :].tolist()) <= {TOKENIZER.pad_token_id or 0}
            found.append((tuple(values), label))
    return found


@settings(deadline=None, max_examples=40)
@given(texts, images, st.integers(1, 7), keys)
def test_every_row_is_there_once_with_its_label(some_texts, some_images, size, key):
    found = rows_of(LabelledTexts.of(some_texts, TOKENIZER, 12, CLASSES), size, key)
    ids = [TOKENIZER(row.prompt)["input_ids"][:12] for row in some_texts]
    assert sorted(found) == sorted(
        (tuple(each), CLASSES.index(row.response)) for each, row in zip(ids, some_texts, strict=True)
    )
    found = rows_of(LabelledImages.of(some_images, CLASSES), size, key)
    expected = [
        (tuple(torch.tensor(list(row.image.pixels)).div(255).tolist()), CLASSES.index(row.response))
        for row in some_images
    ]
    assert sorted(found) == sorted(expected)
    if key is None:
        assert found == expected  # images are evaluated in their order


@settings(deadline=None, max_examples=40)
@given(either, st.data())
def test_taken_rows_are_the_rows(examples, data):
    rows = data.draw(st.lists(st.integers(0, len(examples) - 1), max_size=10)) if len(examples) else []
    everything = dict(zip(examples.longest_first, rows_of(examples), strict=True))  # batches of evaluation follow it
    taken = examples.take(rows)
    assert dict(zip(taken.longest_first, rows_of(taken), strict=True)) == {
        place: everything[row] for place, row in enumerate(rows)
    }


def test_the_order_depends_on_the_key_alone():
    texts = [text("a" * (1 + row % 9), CLASSES[row % 3]) for row in range(90)]
    images = [image(bytes([row] * 6), CLASSES[row % 3]) for row in range(90)]
    state = torch.get_rng_state()
    for examples in (LabelledTexts.of(texts, TOKENIZER, 12, CLASSES), LabelledImages.of(images, CLASSES)):
        first, other = (rows_of(examples, 4, Key.of(seed)) for seed in (1, 2))
        list(examples.batches(3, Key.of(3)))
        assert rows_of(examples, 4, Key.of(1)) == first != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_text_is_cut_at_the_end_and_special_tokens_stay():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", truncation_side="left")
    (batch,) = LabelledTexts.of([text("a b c a", "sport"), text("b", "sport")], tokenizer, 4, CLASSES).batches(2, None)
    assert batch.input_ids.tolist() == [[1, 3, 4, 2], [1, 4, 2, 0]]
    assert tokenizer.truncation_side == "left"
    parts = [[text("a b c a", "sport"), text("b", "sport")], [text("a b", "sport")]]
    (note,) = cut_texts(parts, tokenizer, 4)
    assert note == "text.max_tokens=4 cuts, of all 3 texts, 1 at the end (33% of their tokens are lost)"
    assert cut_texts(parts, tokenizer, 6) == ()


def test_an_image_has_as_many_pixels_as_its_shape_says():
    with pytest.raises(UserError, match="1 x 2 x 3 has 5 bytes"):
        Image(bytes(5), (1, 2, 3))


FAULTS = {
    "7 of 8 examples are images and the model reads texts": ([text("a", "sport")] + 7 * [image(bytes(6), "sport")], 0),
    "1 of 2 examples are texts and the model reads images": ([image(bytes(6), "sport"), text("a", "sport")], 1),
    'label "sports" (2 rows) is no class: did you mean "sport"': (
        3 * [text("a", "sport")] + 2 * [text("a", "sports")],
        0,
    ),
    'label "a�b" (1 row) is no class': ([image(bytes(6), "a\nb")], 1),
    "set data.prompt_column to the column of texts": ([Example((Turn("assistant", "a text alone"),))], 0),
    "1 of 2 texts are empty": ([text("a", "sport"), text(" \n", "sport")], 0),
    "several shapes (1x2x3, 1x3x2)": ([image(bytes(6), "sport"), image(bytes(6), "sport", (1, 3, 2))], 1),
}


@pytest.mark.parametrize("message", FAULTS)
def test_rows_that_do_not_fit_are_one_line(message):
    rows, images = FAULTS[message]
    with pytest.raises(UserError) as error:
        LabelledImages.of(rows, CLASSES) if images else LabelledTexts.of(rows, TOKENIZER, 12, CLASSES)
    assert message in str(error.value) and "\n" not in str(error.value)
