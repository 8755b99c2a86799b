# The image of every pod and container: Ray, PyTorch, LServe.
#
#   docker build -t lserve:0.1.0 .                                                        without GPUs
#   docker build -t lserve:0.1.0-gpu --build-arg RAY_TAG=2.60.0-py311-gpu --build-arg TORCH_INDEX= .
ARG RAY_TAG=2.60.0-py311-cpu
FROM rayproject/ray:${RAY_TAG}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch==2.13.0 ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}}

COPY --chown=ray:users . /home/ray/lserve
RUN pip install --no-cache-dir "/home/ray/lserve[nixl]"
