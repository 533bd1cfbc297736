"""Engine whose turns are played together: what a loop does that waits for the slowest of each turn."""

import asyncio

from thinkimg.engine.request import Generation


class Barrier:
    """An engine that begins no turn before all `parties` conversations wait for one; those that have ended leave."""

    def __init__(self, engine, parties: int):
        self.engine, self.parties, self.waiting = engine, parties, []
        self.concurrency = parties

    async def generate(self, *request) -> Generation:
        """Wait for the others, then generate."""
        self.waiting.append(turn := asyncio.Event())
        self.leave(0)
        await turn.wait()
        return await self.engine.generate(*request)

    def leave(self, parties: int = 1) -> None:
        """Go on without so many conversations."""
        self.parties -= parties
        if len(self.waiting) == self.parties:
            while self.waiting:
                self.waiting.pop(0).set()
