"""Train on poses.sdf and measured.csv, score new.sdf, and save and reload the model."""

import matplotlib.pyplot as plt
import polars as pl
import torch
from rdkit.Chem import Crippen, Descriptors3D, SDMolSupplier, rdMolDescriptors
from torch import nn

from mtenn_core import MultiPoseModel, effective_poses, registry


def features(mol):  # of one pose. Put your own here: equally many finite numbers for each pose
    flat = [Crippen.MolLogP, Crippen.MolMR, rdMolDescriptors.CalcTPSA, rdMolDescriptors.CalcNumHBD]
    return [f(mol) for f in flat] + list(Descriptors3D.CalcMolDescriptors3D(mol).values())


def read_poses(path):  # {name of a compound: shape (n_poses, n_features)}
    poses = {}
    for mol in filter(None, SDMolSupplier(path, removeHs=False)):  # RDKit names unreadable records
        poses.setdefault(mol.GetProp("_Name"), []).append(features(mol))
    return {name: torch.tensor(rows) for name, rows in poses.items()}


class PoseModel(nn.Module):  # from the features of n poses to n ΔG. Put your own network here
    def __init__(self, n_features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        self.layers = nn.Sequential(nn.Linear(n_features, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, poses):
        return self.layers((poses - self.mean) / self.std)


def predict(model, compounds):  # all compounds in one call
    return model(torch.cat(compounds), sizes=[len(poses) for poses in compounds], collated=True)


table = pl.read_csv("measured.csv", schema_overrides={"name": pl.String})  # dG in kcal/mol
measured = dict(zip(table["name"], table["dG"], strict=True))
compounds, new = read_poses("poses.sdf"), read_poses("new.sdf")
print("left out, no poses or no ΔG:", sorted(measured.keys() ^ compounds.keys()))
torch.manual_seed(0)
names = sorted(measured.keys() & compounds.keys())
names = [names[i] for i in torch.randperm(len(names))]
poses, y = [compounds[name] for name in names], torch.tensor([measured[name] for name in names])
n_test = len(names) // 5  # the first n_test compounds only test the model
rows = torch.cat(poses[n_test:])
boltzmann = registry.create("boltzmann", kT=0.593, learnable=True)
model = MultiPoseModel(PoseModel(rows.shape[1]), boltzmann)
model.pose_model.mean, model.pose_model.std = rows.mean(0), rows.std(0).clamp(min=1e-3)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
for _ in range(300):
    optimizer.zero_grad()
    (predict(model, poses[n_test:]).prediction - y[n_test:]).square().mean().backward()
    optimizer.step()

predicted = predict(model.eval().requires_grad_(False), poses).prediction
for label, part in (("train", slice(n_test, None)), ("test", slice(n_test))):
    print(f"{label}: RMSE {(predicted - y)[part].square().mean().sqrt():.2f} kcal/mol")
    plt.scatter(y[part], predicted[part], s=8, label=label)
plt.gca().set(xlabel="measured ΔG (kcal/mol)", ylabel="predicted ΔG (kcal/mol)")
plt.legend()
plt.savefig("predicted.png")

sizes, out = [len(poses) for poses in new.values()], predict(model, list(new.values()))
weights = model.pose_weights(out.pose_predictions, sizes)
columns = [list(new), out.prediction.tolist(), effective_poses(weights, sizes).tolist()]
pl.DataFrame(columns, ["name", "dG", "effective_poses"]).write_csv("scores.csv", float_precision=2)
best = int(out.prediction.argmin())
print("best:", list(new)[best], "with weights", weights.split(sizes)[best])

torch.save(model.state_dict(), "model.pt")
again = MultiPoseModel(PoseModel(rows.shape[1]), registry.from_checkpoint("model.pt"))
again.load_state_dict(torch.load("model.pt", weights_only=True))
assert torch.equal(predict(again.eval(), list(new.values())).prediction, out.prediction)
