"""The rewards: every module of rules/ and judges/ is one component, named like its file.

Such a module defines NAME and `score(batch) -> list[Score]`: one for each trajectory, in order, pure, with values in
[0, 1]. A rule reads the trajectory. A judge looks at processed images, and defines `identity` and `judge` besides (see
context.Judge): what models find, by content, from which `score` then only reads. A user's own functions join them by
import path.
"""
