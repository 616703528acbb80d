"""The weighted kNN vote for four k at once, against one pass per k; and features in bf16 against float32.

Run it as `python benchmarks/knn.py`. Vote: EuroSAT's size, 21,600 and 5,400 features, 10 classes; against
votes of 1,000-class one-hot vectors; the predictions have to be identical. Features have to agree to .005.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from benchmarks.timing import compare
from eval_knn import knn_predict

KS, TEMP = [10, 20, 100, 200], 0.07


def plain(train: Tensor, labels: Tensor, test: Tensor, k: int, C: int = 1000) -> Tensor:
    """One k, in 100 chunks: similarities, top-k, one-hot of 1,000 classes."""
    predictions = []
    for chunk in test.split(len(test) // 100):
        similarity, neighbours = (chunk @ train.T).topk(k)
        voters = labels[neighbours]  # m x k
        one_hot = torch.zeros(len(chunk) * k, C).scatter_(1, voters.view(-1, 1), 1)
        weights = (similarity / TEMP).exp()
        votes = (one_hot.view(len(chunk), k, C) * weights.unsqueeze(-1)).sum(1)
        predictions.append(votes.sort(1, descending=True)[1][:, 0])
    return torch.cat(predictions)


def main() -> None:
    """One comparison."""
    torch.manual_seed(0)
    labels, test_labels = torch.randint(10, (21_600,)), torch.randint(10, (5_400,))
    centers = torch.randn(10, 384)
    train, test = (F.normalize(centers[y] + 4 * torch.randn(len(y), 384), dim=1)
                   for y in (labels, test_labels))
    compare(f"kNN of 4 k, {torch.get_num_threads()} threads",
            lambda: knn_predict(train, labels, test, KS, TEMP),
            lambda: torch.stack([plain(train, labels, test, k) for k in KS], 1))

    networks, images = [], torch.randn(16, 3, 224, 224)
    for amp in ("auto", "off"):
        common.choose_attention(amp, torch.device("cpu"))
        autocast = common.autocast(amp, torch.device("cpu"))
        networks.append((common.build_backbone("vit_small_patch16_224", 224).eval(), autocast))
    networks[1][0].load_state_dict(networks[0][0].state_dict())

    @torch.inference_mode()
    def features(model: torch.nn.Module, autocast: torch.autocast) -> Tensor:
        with autocast:
            return F.normalize(model(images).float(), dim=1)

    compare(f"features of ViT-S/16, 16 images of 224 px, --amp auto against off, {torch.get_num_threads()} "
            "threads", lambda: features(*networks[0]), lambda: features(*networks[1]), atol=5e-3)


if __name__ == "__main__":
    main()
