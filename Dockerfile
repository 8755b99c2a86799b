# syntax=docker/dockerfile:1
# The image of every pod and container, and of one machine: Ray, PyTorch, LServe.
#
#   docker build -t lserve:0.1.0 .                                       without GPUs
#   docker build -t lserve:0.1.0-gpu --build-arg ACCELERATOR=cu128 .     with NVIDIA GPUs
#   docker run --rm -p 127.0.0.1:8000:8000 --shm-size 2g -v lserve-models:/models lserve:0.1.0
#
# With a GPU too it starts from Ray's image without CUDA: PyTorch's wheels bring the libraries that they need, and the
# driver comes from the host. Where PyTorch's index has no such build, or ACCELERATOR is empty, PyPI's is taken.
ARG RAY_VERSION=2.60.0

FROM rayproject/ray:${RAY_VERSION}-py311-cpu AS wheel
COPY --chown=1000:100 . /tmp/lserve
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/dist /tmp/lserve

FROM rayproject/ray:${RAY_VERSION}-py311-cpu
ARG ACCELERATOR=cpu
ARG TORCH_VERSION=2.13.0

# From what changes least to what changes most: PyTorch, the other dependencies, LServe.
RUN pip install --no-cache-dir "torch==${TORCH_VERSION}" \
    ${ACCELERATOR:+--extra-index-url "https://download.pytorch.org/whl/${ACCELERATOR}"}
RUN --mount=type=bind,source=pyproject.toml,target=/tmp/pyproject.toml \
    python -c "import tomllib; p = tomllib.load(open('/tmp/pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], *p['optional-dependencies']['nixl'], sep='\n')" > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt
RUN --mount=type=bind,from=wheel,source=/tmp/dist,target=/tmp/dist \
    pip install --no-cache-dir --no-deps /tmp/dist/*.whl

# Numbers, since Kubernetes' runAsNonRoot does not look up names. 1000:100 is the `ray` of Ray's image.
USER 0
RUN install --directory --owner=1000 --group=100 /models
USER 1000:100

ENV HF_HOME=/models \
    XDG_CACHE_HOME=/models/cache \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    RAY_USAGE_STATS_ENABLED=0
VOLUME /models
EXPOSE 8000
# 200 once tokens can be served; Kubernetes has probes of its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
CMD ["lserve", "up", "--host", "0.0.0.0"]
