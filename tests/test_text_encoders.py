"""Text encoders of transformers', tiny and with random weights, each against the library's own call.

In a process of its own: transformers is installed apart, and diffusers must not find it (`make .venv/text`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = Path(__file__).parents[1] / ".venv" / "text"

CASE = r"""
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import numpy as np, torch, transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from ldt.errors import InputError
from ldt.models.text_encoder import describe, load_text_encoder, reload_text_encoder

kind, root = sys.argv[1], Path(sys.argv[2])
words = ["<pad>", "<unk>", "red", "heart", "green", "apple"]
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
torch.manual_seed(0)
small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=6)
if kind == "t5":
    model = tf.T5EncoderModel(tf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=6))
elif kind == "clip":
    model = tf.CLIPTextModel(tf.CLIPTextConfig(**small, max_position_embeddings=16))
else:
    model = tf.BertModel(tf.BertConfig(**small, max_position_embeddings=16))
model.eval().save_pretrained(root, safe_serialization=True)
fast.save_pretrained(root)

encoder = load_text_encoder(str(root), 4)
assert encoder.shape == (4, 16, 0), encoder.shape
captions = ["red heart", "", "green apple red heart green", "  ", "apple " * 20_000]
out = encoder.encode(captions)
assert out.dtype == np.float16 and out.shape == (5, 4, 16)
assert not out[1].any() and not out[3].any()
assert not out[0, 2:].any() and out[0, :2].any(-1).all() and out[2].any(-1).all() and out[4].any(-1).all()
tokens = fast(["red heart"], return_tensors="pt")
with torch.no_grad():
    expected = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state[0]
np.testing.assert_allclose(out[0, :2], expected.numpy(), rtol=2e-3, atol=2e-3)
described = describe(encoder)
assert reload_text_encoder(described | {"examples": []}).hash == encoder.hash
with torch.no_grad():
    next(iter(model.parameters())).add_(1)
model.save_pretrained(root, safe_serialization=True)
try:
    reload_text_encoder(described)
except InputError as error:
    assert "is not the one that the captions were encoded with" in str(error)
else:
    raise AssertionError("other weights were accepted")
try:
    load_text_encoder(str(root / "nowhere"), 4)
except InputError as error:
    assert "can't be loaded" in str(error) and "text.encoder=bytes" in str(error)
else:
    raise AssertionError("an encoder that is not there was loaded")
print("done")
"""


@pytest.mark.parametrize("kind", ["t5", "clip", "bert"])
def test_encoders_give_what_the_library_gives(kind, tmp_path):
    assert (LIBRARIES / "transformers").is_dir(), "make .venv/text installs transformers for this test"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(LIBRARIES)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CASE, kind, tmp_path / "encoder"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]
