"""A file gives back the function that was saved, or nothing: every transformation, every sort of owner, in a process that knows only the classes."""
import copy, json, math, os, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelzip.archive import PackError
from modelzip.data import LeNet5, register_model
from modelzip.exchange import from_npz, from_safetensors, to_npz, to_safetensors
from modelzip.pack import load, save
from modelzip.quant import quantize_model
from modelzip.workshop import kinds

torch.set_num_threads(1)

CLASSES = '''
import torch
from torch import nn
from modelzip.data import register_model

class Images(nn.Module):
    "BatchNorm, strides, slopes."
    def __init__(self, width=16):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(.3)
        self.conv2, self.bn2, self.head = nn.Conv2d(width, width, 3, stride=2), nn.BatchNorm2d(width, eps=.1), nn.Linear(width, 5)
    def forward(self, x): return self.head(torch.relu(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))).mean((2, 3)))

class Words(nn.Module):
    "LayerNorm and attention."
    def __init__(self, width=16):
        super().__init__()
        self.inp, self.norm = nn.Linear(7, width), nn.LayerNorm(width, eps=1e-3)
        self.attention, self.norm2, self.fc1, self.fc2, self.out = nn.MultiheadAttention(width, 2, batch_first=True), nn.LayerNorm(width), nn.Linear(width, 2*width), nn.Linear(2*width, width), nn.Linear(width, 3)
    def forward(self, x):
        x = self.norm(self.inp(x))
        x = self.norm2(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(x + self.fc2(torch.nn.functional.gelu(self.fc1(x))))

@register_model("b8 images")
class KnownImages(Images): pass

@register_model("b8 words")
class KnownWords(Words): pass

def example(name):
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 9, 9, generator=g) if "Images" in name else torch.randn(4, 6, 7, generator=g)
'''

CHILD = '''
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import b8_classes as here
from modelzip.pack import PackError, load
out = {}
for case, (name, path, widths, want) in torch.load(sys.argv[1]).items():
    cls, x = getattr(here, name), here.example(name)
    for how, model in ({"alone": None} | {f"width {w}": cls(w).eval() for w in widths}).items():
        try: got = load(path, model)
        except PackError as e: out[f"{case}, {how}"] = str(e); continue
        with torch.no_grad(): y = got(x)
        out[f"{case}, {how}"] = (y - want).abs().max().item()
print(json.dumps(out))
'''


def transformations(x):
    "Name → what turns a model into what is saved."
    from modelzip import auto, kernels, prune, ptq, qat, structured
    def shrunk(m): return structured.shrink(m, (x,), ratio=.5)
    def quick(m): return kernels.use_kernels(quantize_model(m, 8))
    def trained(m): return qat.convert(qat.prepare(m, 8, batches=[x]))
    def thin(m): return structured.factorize(m, rank=2, layers=[n for n, l in m.named_modules() if isinstance(l, (nn.Linear, nn.Conv2d)) and "attention" not in n])
    def sparse(m): return prune.sparsify_model(prune.prune_model(m, .6))
    found = {"nothing": lambda m: m, "quantize_model": lambda m: quantize_model(m, 4), "use_kernels": quick, "prune and sparsify": sparse, "shrink": shrunk,
             "shrink, then quantize": lambda m: quantize_model(shrunk(m), 4), "fold_batchnorm": structured.fold_batchnorm, "factorize": thin,
             "convert": trained, "gptq": lambda m: ptq.gptq(m, [x]), "awq": lambda m: ptq.awq(m, ptq.calibrate(m, [x])), "smooth": lambda m: ptq.smooth(m, ptq.calibrate(m, [x])), "half": lambda m: copy.deepcopy(m).bfloat16().float(),
             "everything": lambda m: quantize_model(thin(shrunk(structured.fold_batchnorm(m))), 4)}
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    "Everything is saved here and loaded elsewhere, in one process that has nothing but the classes."
    folder = tmp_path_factory.mktemp("b8")
    (folder/"b8_classes.py").write_text(CLASSES); (folder/"child.py").write_text(CHILD)
    sys.path.insert(0, str(folder))
    try: import b8_classes as here
    finally: sys.path.remove(str(folder))
    cases = {}
    for name in "Images", "Words", "KnownImages", "KnownWords":
        x = here.example(name)
        for how, change in transformations(x).items():
            torch.manual_seed(0)
            m = getattr(here, name)().eval()
            for norm in m.modules():      # statistics that are not those of a new layer
                if isinstance(norm, nn.BatchNorm2d): norm.running_mean.normal_(); norm.running_var.uniform_(.5, 2); nn.init.normal_(norm.weight); nn.init.normal_(norm.bias)
            m = change(m).eval()
            if not how.startswith("nothing"): assert m is not None
            with torch.no_grad(): y = m(x)
            path = save(m, folder/f"{name} {how}.mz".replace(",", ""), archive="solid" if how in ("factorize", "shrink") else how != "quantize_model")
            cases[f"{name}, {how}"] = (name, str(path), [16, 8, 12], y)
    torch.save(cases, folder/"cases.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent.parent)])}
    r = subprocess.run([sys.executable, "child.py", "cases.pt"], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout)

def test_no_file_gives_another_function(outcomes):
    wrong = {k: v for k, v in outcomes.items() if not isinstance(v, str) and not v <= 1e-5}
    assert not wrong

def test_what_is_known_opens_alone_and_what_is_not_says_what_to_pass(outcomes):
    refused = {k: v for k, v in outcomes.items() if isinstance(v, str)}
    for k, v in refused.items():
        if k.startswith("Known"): raise AssertionError(f"{k}: {v}")
        assert k.endswith("alone") and "load(path, model)" in v and k.split(",")[0] in v, (k, v)
    assert len(refused) == sum(k.endswith("alone") and not k.startswith("Known") for k in outcomes)
