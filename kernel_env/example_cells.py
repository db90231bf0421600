# The policy of `kernel-env run`: each cell is one action. It runs in the episode's kernel, where
# `context`, `llm_query_batched` and `FINAL` are.

# %% What is in the context?
print(f"{len(context):,} characters")
print(context[:300])

# %% Cut it into topics.
topics = {}
for part in context.split("=== topic: ")[1:]:
    name, _, text = part.partition("\n")
    topics[name] = text
longest = sorted(topics, key=lambda name: len(topics[name]), reverse=True)
{name: len(topics[name]) for name in longest[:5]}

# %% Ask the model about every topic at once.
question = "Does this text speak of exceptions? Begin with yes or no."
replies = llm_query_batched([f"{question}\n{topics[name]}" for name in longest])
print(len(replies), "replies; the first:", replies[0])

# %% Count, and answer.
yes = [name for name, reply in zip(longest, replies) if reply.startswith("yes")]
print(f"{len(yes)} of {len(topics)} topics")
FINAL(f"{len(yes)}, {yes[0]}")
