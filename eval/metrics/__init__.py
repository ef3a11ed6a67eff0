"""One metric a file; each a pure function of features, images or verdicts.

| module             | says                                                     | source                    |
|--------------------|----------------------------------------------------------|---------------------------|
| `frechet`          | how far apart two sets of images lie in a feature space  | Heusel et al. 2017        |
| `kid`, on `mmd`    | the same, without a bias and without Gaussians           | Bińkowski et al. 2018     |
| `cmmd`, on `mmd`   | the same, in CLIP's space                                | Jayasumana et al. 2024    |
| `mind`             | the same, along random directions                        | Berthet et al. 2026       |
| `patches`          | crops: distances of them see sharpness and texture       | Lin et al. 2024           |
| `precision_recall` | how many images are good; how much of the truth is made  | Kynkäänniemi et al. 2019  |
| `clip_score`       | how well images fit their prompts                        | Hessel et al. 2021        |
| `perceptual`       | how different two images look                            | Zhang et al. 2018         |
| `diversity`        | how different the images of one prompt look              | Zhu et al. 2017           |
| `prompt_accuracy`  | how often a shapes picture shows what its prompt asks for| `diffusion_kd.shapes`     |
| `speed`            | latency, throughput, memory and cost                     |                           |

The feature network is always an argument and belongs into the reported metric's name: `FD[shapes-encoder]` and the
FID of Inception features are different quantities.
"""
