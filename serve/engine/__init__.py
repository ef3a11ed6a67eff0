"""The engine: the one owner of the device in the service. It knows no HTTP and no database.

| name            | what it does                                                              |
|-----------------|---------------------------------------------------------------------------|
| engine.py       | `Engine`: one thread, one pass at a time, requests join and leave at steps |
| stages.py       | reading prompts, a step, decoding, for a batch; what does not fit is halved |
| observer.py     | who watches it                                                             |
| lanes.py        | a tier's queue, its images on their way, its share of the device           |
| requests.py     | what goes in and what comes out                                           |
| trajectory.py   | one image on its way from noise to x0                                     |
| models.py       | teacher and student in memory, what they share kept once                  |
| embeddings.py   | what the text encoders made of recent prompts                             |
| encoding.py     | pixels to files                                                           |
| errors.py       | what it says when it cannot                                               |
"""
