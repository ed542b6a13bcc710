"""What a judge or a reward reads: a comparison of two replies as text. Pure functions of text."""


def judge_prompt(prompt, reply_a, reply_b, principle):
    """The text after which a judge says " A" or " B", whichever reply is better."""
    return f"Question:\n{prompt}\nReply A:\n{reply_a}\nReply B:\n{reply_b}\n{principle} Better:"


def question(messages):
    """What a reward function gets as the prompt: the text of a single message, or the messages."""
    return messages[-1]["content"] if len(messages) == 1 else messages


def transcript(messages):
    """A conversation as one text: that of a single message, else "role: content" lines."""
    if len(messages) == 1:
        return messages[-1]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)
