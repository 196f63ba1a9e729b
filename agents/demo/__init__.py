"""`vmferry demo`: two real agents on this machine, a guest that moves between them while it runs, and the proof.

Law: a user of the engine like any other: agents are processes of their own, and are asked through `agents.client`.
Everything lives in one scratch directory, and nothing that was started outlives `run_demo`.
"""
