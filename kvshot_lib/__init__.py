"""The KVShot study: does reusing a target's KV cache keep a speculative drafter accurate over many draft steps?"""
