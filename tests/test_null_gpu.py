"""What needs no numbers of a GPU, on the null GPU: without a GPU, by make test."""
import pytest
@pytest.mark.parametrize("i", range(4))
def test_x(null_gpu, tmp_path, i):
    code = "import torch; from tests.helpers.null_gpu import *\nc=counts()\nwith log() as l: torch.ones(3,device='cuda')@torch.ones(3,3,device='cuda')\nprint(is_null(), counts().since(c), l, torch.cuda.device_count(), torch.cuda.get_device_capability())"
    d = null_gpu.run(["-c", code], tmp_path, capability=75, count=2)
    assert d.returncode == 0, d.stderr
    print(d.stdout)
