"""The playground: one page for people, on the service layer; it knows no routes.

| module     | tab                                                                                        |
|------------|--------------------------------------------------------------------------------------------|
| `compare`  | one prompt and seed in both tiers, side by side, with a wipe between them                  |
| `opinions` | blind votes: which picture is better?                                                      |
| `quality`  | what the evaluation found, what people prefer, two artifacts beside each other             |
| `savings`  | what distilling saves, before the money is spent                                           |
| `runs`     | training runs as they go                                                                   |
| `page`     | all of them together, and where they are mounted                                           |
| `stage`, `drawing`, `words`, `html` | whose request it is; pictures as they come; numbers for people; templates |
"""
