"""What the example workloads share: `methods` names compressions, `loop` trains."""
