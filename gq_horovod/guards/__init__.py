"""What watches a training: waits that never end, replicas that drift apart, errors of quantization.

`watchdog`, `replicas`, `stats`: each is an option of GlobalQSGD, and changes no result.
"""
