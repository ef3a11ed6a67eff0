"""`/v1/admin/keys`: who may ask, and for how much."""

import asyncio

from fastapi import APIRouter, Depends

from serve import costs, deps, errors, schemas
from serve.service import OWN_KEYS
from serve.store import Key

router = APIRouter(prefix="/v1/admin/keys", tags=["admin"], dependencies=[Depends(deps.known_query)])


@router.post("", response_model=schemas.NewKeyOut, status_code=201, responses=deps.refusals(400, 401, 403, 408, 413))
async def create(body: schemas.KeyBody, _: deps.Admin, service: deps.TheService) -> schemas.NewKeyOut:
    """A new key. Its secret is shown this once and stored hashed."""
    budget = None if body.monthly_budget_usd is None else costs.to_nanousd(body.monthly_budget_usd)
    key, secret = await asyncio.to_thread(
        service.store.create_key, body.name, body.scopes, body.requests_per_minute, budget
    )
    return schemas.NewKeyOut(secret=secret, **shown(key).model_dump())


@router.get("", response_model=schemas.KeysOut, responses=deps.refusals(400, 401, 403))
async def every(_: deps.Admin, service: deps.TheService, include_revoked: bool = False) -> schemas.KeysOut:
    """All keys, newest first, without their secrets."""
    keys = await asyncio.to_thread(service.store.list_keys, include_revoked=include_revoked)
    return schemas.KeysOut(data=[shown(key) for key in keys])


@router.delete("/{key_id}", response_model=schemas.RevokedOut, responses=deps.refusals(400, 401, 403, 404))
async def revoke(key_id: str, _: deps.Admin, service: deps.TheService) -> schemas.RevokedOut:
    """Revoke a key, at once and for ever. Its usage stays; its accepted jobs are still carried out."""
    if key_id in OWN_KEYS:
        raise errors.InvalidField(f"the key {key_id} is made by the service's settings; change those", param="key_id")
    if "\0" in key_id or not await asyncio.to_thread(service.store.revoke_key, key_id):
        raise errors.NotFound("no such key, or it is revoked already")
    return schemas.RevokedOut(id=key_id, revoked=True)


def shown(key: Key) -> schemas.KeyOut:
    """A key as it is listed."""
    budget = key.monthly_budget_nanousd
    return schemas.KeyOut(
        id=key.id,
        name=key.name,
        prefix=key.prefix,
        scopes=sorted(key.scopes),  # type: ignore[arg-type]
        requests_per_minute=key.requests_per_minute,
        monthly_budget_usd=None if budget is None else costs.to_usd(budget),
        created_at=int(key.created_at.timestamp()),
        revoked_at=None if key.revoked_at is None else int(key.revoked_at.timestamp()),
    )
