from importlib.util import find_spec

import pytest
from programs import run
from tiny import write_tiny

HEAVY = {"jax", "optax", "numpy", "transformers", "torch", "safetensors", "flax", "orbax"}
HEAVY |= {"gguf", "rich", "tokenizers", "huggingface_hub"}


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        ("import prox24", set()),
        ("from prox24._cli.main import main; main(['--help'])", set()),
        ("from prox24._cli.main import main; main(['prune', '--help'])", {"jax", "optax", "numpy"}),
    ],
)
def test_what_is_not_needed_is_not_imported(code, needed):
    code = f"import sys, contextlib\nwith contextlib.suppress(SystemExit): {code}\n"
    code += f"print(*sorted({HEAVY} & sys.modules.keys()))"
    assert set(run("-c", code).splitlines()[-1].split()) == needed


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchax") is not None, reason="torchax needs torch")
def test_a_command_does_not_import_torch(tmp_path):
    write_tiny(tmp_path / "model")
    code = "import sys; from prox24._cli.main import main; main(); print(sys.modules['torch'])"
    assert run("-c", code, "inspect", tmp_path / "model").splitlines()[-1] == "None"
