"""Adapters by which other frameworks play our conversations and score them with our rules.

    TRL's GRPOTrainer ──► trl.make_environment: a method per tool ──┐
    verifiers' vf-eval ──► verifiers/thinkimg_env: a harness ───────┴──► engine.play.play_turns ──► TextCore
                                                                     task.Tasks.score ──► rewards/rules

A framework samples and keeps its tokens. Prompts, tools, observations and rewards are those of training and evaluation.
"""
