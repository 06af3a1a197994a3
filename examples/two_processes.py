"""One process sends 10,000 tokens to another, through a pool that holds 4,096. No model needed."""

import multiprocessing

import ml_dtypes
import numpy as np

from embedwire import Field, Layout, ReceiverEndpoint, SenderEndpoint

LAYOUT = Layout("ITEM", (Field("embeddings", "bfloat16", (2048,)),))
ROOM, TOKENS = 7, 10_000


def embedding():
    return np.random.default_rng(ROOM).random((TOKENS, 2048), np.float32).astype(ml_dtypes.bfloat16)


def send(pipe):
    with SenderEndpoint(LAYOUT) as sender:
        offer = sender.offer(ROOM, total_tokens=TOKENS)  # its memory is reserved
        pipe.send(sender.address)
        offer.fill({"embeddings": embedding()})  # the source is ready
        offer.result(60)  # the receiver says that it has all of it


if __name__ == "__main__":
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=send, args=(there,))
    child.start()
    with ReceiverEndpoint(LAYOUT, num_blocks=32, block_size=128) as receiver:
        received = receiver.open(ROOM, here.recv()).result(60)
        print(received.arrays["embeddings"].shape, "in rounds of", received.report.rounds)
        print("every byte is right:", np.array_equal(received.arrays["embeddings"], embedding()))
    child.join()
